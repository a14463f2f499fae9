"""SFT's and DPO's losses and given completions: catches a prompt or padding trained, an end-of-turn token not trained, a shift by
one, a mean where the sum belongs, a turned sign, and pairs that teach something else than the task.
"""

import math

import minimal_dpo
import minimal_grpo
import minimal_sft
import pytest
import torch
from torch.nn.functional import cross_entropy

PROMPTS = ["What is 3 + 8?", "Hi", "What is 0 + 0? Take your time."]
COMPLETIONS = ["<answer>11</answer>", "No", "<answer>0</answer> as you see"]


@pytest.fixture(params=["qwen", "llama", "pad is eos"])
def given(request, tiny):
    model, tokenizer = tiny(request.param if request.param != "pad is eos" else "qwen")
    if request.param == "pad is eos":
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer, *minimal_sft.encode_given(model, tokenizer, PROMPTS, COMPLETIONS)


def test_given_completions_stand_where_sampled_ones_would(given):
    model, tokenizer, ids, attn, mask = given
    P = ids.shape[1] - mask.shape[1]
    prompt_ids, prompt_attn, *_ = minimal_sft.sample(model, tokenizer, PROMPTS, 0)
    assert (
        torch.equal(ids[:, :P], prompt_ids)
        and torch.equal(attn[:, :P], prompt_attn)
        and torch.equal(attn[:, P:], mask.long())
    )
    for i, completion in enumerate(COMPLETIONS):
        wanted = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert ids[i, P : P + len(wanted)].tolist() == wanted
        assert mask[i].tolist() == [1.0] * len(wanted) + [0.0] * (mask.shape[1] - len(wanted))


def test_sft_loss_is_the_cross_entropy_of_the_completion(given):
    model, tokenizer, ids, attn, mask = given
    logp = minimal_sft.completion_logp(model, ids, attn, mask)
    loss = minimal_sft.sft_loss(
        logp,
        mask
        / sum(
            len(c)
            for c in tokenizer([c + tokenizer.eos_token for c in COMPLETIONS], add_special_tokens=False)[
                "input_ids"
            ]
        ),
    )
    rows, targets = [], []
    for i in range(len(ids)):  # each row alone: no padding, labels of -100 on the prompt
        row, n = ids[i][attn[i] == 1], int(mask[i].sum())
        labels = row.clone()
        labels[:-n] = -100
        rows.append(model(row[None]).logits[0, :-1])
        targets.append(labels[1:])
    expected = cross_entropy(torch.cat(rows), torch.cat(targets), ignore_index=-100)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_dpo_loss_by_hand():
    logp = torch.tensor([-1.0, -4.0, -3.0, -2.5], requires_grad=True)  # chosen, chosen, rejected, rejected
    ref = torch.tensor([-1.5, -3.0, -2.0, -2.5])
    loss, metrics = minimal_dpo.dpo_loss(logp, ref, 0.1)
    margins = [0.1 * ((-1.0 + 1.5) - (-3.0 + 2.0)), 0.1 * ((-4.0 + 3.0) - (-2.5 + 2.5))]  # 0.15 and -0.1
    sigmoid = [1 / (1 + math.exp(-m)) for m in margins]
    assert loss.item() == pytest.approx(-sum(map(math.log, sigmoid)) / 2)
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(
        {"margin": 0.025, "accuracy": 0.5, "chosen_logp": -2.5, "rejected_logp": -2.75}
    )
    loss.backward()
    slope = [0.1 * (1 - s) / 2 for s in sigmoid]  # of log sigmoid, times beta, over two pairs
    assert logp.grad.tolist() == pytest.approx([-slope[0], -slope[1], slope[0], slope[1]])


def test_dpo_starts_at_ln_2():
    logp = torch.randn(8)
    loss, metrics = minimal_dpo.dpo_loss(logp, logp, 0.1)
    assert loss.item() == pytest.approx(math.log(2)) and (metrics["margin"], metrics["accuracy"]) == (0, 0)


def test_pairs_are_about_the_answer_and_its_form():
    kinds = set()
    for prompt, answer in list(minimal_dpo.SUMS.items()) * 5:
        chosen, rejected = minimal_dpo.sum_pair(prompt)
        assert minimal_grpo.sum_reward(prompt, chosen) == {"accuracy": 1}
        assert minimal_grpo.sum_reward(prompt, rejected) == {"accuracy": 0}
        kinds.add("wrong number" if "answer" in rejected else "no tags")
        assert ("answer" in rejected) != (rejected.split()[-1] == str(answer))
    assert kinds == {"wrong number", "no tags"}


def test_sft_loop(main, tiny):
    g = main("minimal_sft.py --steps 2 --lr 1e-5")
    assert [record["step"] for record in g["history"]] == [0, 1] and g["history"][-1]["loss"] == g[
        "loss"
    ].item()
    for text, prompt in zip(g["texts"], g["prompts"], strict=True):
        assert text == f"<answer>{minimal_sft.SUMS[prompt]}</answer>"
    assert not any(torch.equal(a, b) for a, b in zip(g["model"].parameters(), tiny("qwen")[0].parameters()))
    assert g["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-5 / 2)


def test_dpo_loop(main, tiny):
    g = main("minimal_dpo.py --steps 3 --lr 1e-5 --batch-size 5 --beta 0.3")
    first, *_, last = g["history"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and (first["margin"], first["accuracy"]) == (
        0,
        0,
    )
    assert last["loss"] == g["loss"].item() < math.log(2) and last["margin"] > 0
    expected, metrics = minimal_dpo.dpo_loss(g["logp"], g["ref_logps"][-1], 0.3)
    assert last["loss"] == pytest.approx(expected.item()) and last["margin"] == pytest.approx(
        metrics["margin"].item()
    )
    fresh, _ = tiny("qwen")
    assert not any(torch.equal(a, b) for a, b in zip(g["model"].parameters(), fresh.parameters()))
    for (ids, attn, mask, chosen), ref_logp in zip(g["batches"], g["ref_logps"], strict=True):
        assert len(ids) == 10 and not ref_logp.requires_grad
        for i in range(10):  # the reference's log-prob of the whole completion, end-of-turn token included
            row, n = ids[i][attn[i] == 1], int(mask[i].sum())
            alone = -cross_entropy(fresh(row[None]).logits[0, -n - 1 : -1], row[-n:], reduction="sum")
            assert ref_logp[i].item() == pytest.approx(alone.item(), abs=1e-3)
        texts = g["tokenizer"].batch_decode(ids[:, -mask.shape[1] :], skip_special_tokens=True)
        prompts = g["tokenizer"].batch_decode(ids[:, : -mask.shape[1]], skip_special_tokens=True)
        assert tuple(texts[:5]) == chosen and all(a != b for a, b in zip(texts[:5], texts[5:]))
        assert prompts[:5] == prompts[5:]

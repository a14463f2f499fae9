"""SFT's and DPO's losses and given completions: catches a prompt or padding trained, an end-of-turn token not trained, a shift by
one, a mean where the sum belongs, a turned sign, and pairs that teach something else than the task.
"""

import math
import re

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
    return model, tokenizer, *minimal_sft.encode_completions(tokenizer, PROMPTS, COMPLETIONS)


def test_given_completions_stand_where_sampled_ones_would(given):
    model, tokenizer, ids, attn, mask = given
    P = ids.shape[1] - mask.shape[1]
    prompt_ids, prompt_attn = minimal_sft.encode_prompts(tokenizer, PROMPTS)
    assert (
        torch.equal(ids[:, :P], prompt_ids)
        and torch.equal(attn[:, :P], prompt_attn)
        and torch.equal(attn[:, P:], mask.long())
    )
    for i, completion in enumerate(COMPLETIONS):
        wanted = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert ids[i, P : P + len(wanted)].tolist() == wanted
        assert mask[i].tolist() == [1.0] * len(wanted) + [0.0] * (mask.shape[1] - len(wanted))


def cross_entropy_of(model, ids, attn, mask):
    """The mean over all completion tokens, each row alone: no padding, labels of -100 on the prompt."""
    rows, targets = [], []
    for i in range(len(ids)):
        row, n = ids[i][attn[i] == 1], int(mask[i].sum())
        labels = row.clone()
        labels[:-n] = -100
        rows.append(model(row[None]).logits[0, :-1])
        targets.append(labels[1:])
    return cross_entropy(torch.cat(rows), torch.cat(targets), ignore_index=-100)


def test_logp_gives_the_cross_entropy_of_the_completion(given):
    """Loss and gradient; the mean is over the tokens, counted here from the tokenizer."""
    model, tokenizer, ids, attn, mask = given
    ended = [completion + tokenizer.eos_token for completion in COMPLETIONS]
    tokens = sum(len(ids) for ids in tokenizer(ended, add_special_tokens=False)["input_ids"])
    loss = -minimal_sft.completion_logp(model, ids, attn, mask).sum() / tokens
    expected = cross_entropy_of(model, ids, attn, mask)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_dpo_loss_by_hand():
    logp = torch.tensor([-1.0, -4.0, -3.0, -2.5], requires_grad=True)  # chosen, chosen, rejected, rejected
    ref = torch.tensor([-1.5, -3.0, -2.0, -2.5])
    loss, metrics = minimal_dpo.dpo_loss(*logp.chunk(2), *ref.chunk(2), 0.1)
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
    chosen, rejected = torch.randn(2, 4)
    loss, metrics = minimal_dpo.dpo_loss(chosen, rejected, chosen, rejected, 0.1)
    assert loss.item() == pytest.approx(math.log(2)) and (metrics["margin"], metrics["accuracy"]) == (0, 0)


def test_pairs_are_about_the_answer_and_its_form():
    """A rejected completion lacks one of the two, never both: other tags, no tags, another number."""
    kinds = set()
    for prompt, answer in minimal_dpo.TRAIN * 3:
        chosen, rejected = minimal_dpo.preference_pair(prompt, answer)
        assert minimal_grpo.score(chosen, answer) == {"reward": 1}
        assert minimal_grpo.score(rejected, answer) == {"reward": 0}
        assert ("answer" in rejected) != (re.findall(r"\d+", rejected) == [str(answer)])
        kinds.add(re.sub(r"\d+", "n", rejected))
    assert len(kinds) == 3


def moved(model, fresh, optimizer):
    """Each matrix has, and the optimizer has all there is. (The gains of the tiny models are too large to move by lr.)"""
    pairs = zip(model.parameters(), fresh.parameters(), strict=True)
    known = set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    return known and not any(torch.equal(a, b) for a, b in pairs if a.dim() == 2)


def test_sft_loop(main, tiny):
    """With a learning rate of 0 the last loss can be taken again, by cross-entropy."""
    g = main("minimal_sft.py --steps 2 --lr 0")
    assert [record["step"] for record in g["history"]] == [0, 1]
    for text, prompt in zip(g["completions"], g["prompts"], strict=True):
        assert text == f"<answer>{sum(map(int, re.findall(r'[0-9]', prompt)))}</answer>"
    expected = cross_entropy_of(g["model"], g["ids"], g["attn"], g["mask"])
    assert g["history"][-1]["loss"] == g["loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    g = main("minimal_sft.py --steps 2")
    assert moved(g["model"], tiny("qwen")[0], g["optimizer"])


def test_dpo_loop(main, tiny):
    g = main("minimal_dpo.py --steps 3 --batch-size 5 --beta 0.3")
    first, *_, last = g["history"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (first["margin"], first["accuracy"]) == (0, 0)
    assert last["loss"] == g["loss"].item() < math.log(2) and last["margin"] > 0
    fresh, _ = tiny("qwen")
    assert moved(g["model"], fresh, g["optimizer"])
    assert all(torch.equal(a, b) for a, b in zip(g["reference"].parameters(), fresh.parameters()))
    assert not g["ref_chosen"].requires_grad and g["chosen"].requires_grad
    ids, attn, mask, margins = g["ids"], g["attn"], g["mask"], []
    assert len(ids) == 10
    alone = []  # the reference's log-prob of each whole completion, end-of-turn token included
    for i in range(10):
        row, n = ids[i][attn[i] == 1], int(mask[i].sum())
        alone.append(-cross_entropy(fresh(row[None]).logits[0, -n - 1 : -1], row[-n:], reduction="sum"))
    assert torch.allclose(torch.cat([g["ref_chosen"], g["ref_rejected"]]), torch.stack(alone), atol=1e-3)
    for chosen, rejected, i in zip(g["chosen"], g["rejected"], range(5)):
        margins.append(0.3 * (chosen - alone[i] - rejected + alone[i + 5]).item())
    assert last["margin"] == pytest.approx(sum(margins) / 5, abs=1e-3)
    assert last["loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 5, abs=1e-3)
    texts = g["tokenizer"].batch_decode(ids[:, -mask.shape[1] :], skip_special_tokens=True)
    prompts = g["tokenizer"].batch_decode(ids[:, : -mask.shape[1]], skip_special_tokens=True)
    assert texts == g["completions"] and prompts[:5] == prompts[5:]
    rewards = [minimal_grpo.score(t, a)["reward"] for t, a in zip(texts, g["answers"] * 2, strict=True)]
    assert rewards == [1] * 5 + [0] * 5

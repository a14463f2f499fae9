"""REINFORCE's baselines, RLOO's advantage, the type-token ratio and the Llama traits: catches a baseline that knows the batch it is
used on, a leave-one-out mean that leaves nobody out, a word counted wrongly, and a template that changes with the day.
"""

import re

import pytest
import reinforce
import rloo
import torch
from reinforce import ema_baseline, policy_gradient_loss
from rloo import leave_one_out_advantages

QUICK = "--steps 3 --batch-size 4 --max-new-tokens 24"


def score(text, scale=1.0, module=reinforce):
    """score, as it is with --brevity-penalty-scale."""
    module.args = module.Args(brevity_penalty_scale=scale)
    return module.score(text, 40)


@pytest.mark.parametrize(
    "text, ratio, words",
    [
        ("", 0.0, 0),
        ("  \n ", 0.0, 0),
        ("123 4.5 !? --- _", 0.0, 0),
        ("One", 1.0, 1),
        ("The the THE tHe", 1 / 4, 4),
        ("Don't stop; don’t stop.", 3 / 4, 4),  # a straight and a curly apostrophe are two spellings
        ("It's its own 'quoted' word's", 1.0, 5),
        ("x1y x2y", 2 / 4, 4),  # digits part words
        ("Über über naïve naïve 東京", 3 / 5, 5),
        ("well-known, well known", 2 / 4, 4),
    ],
)
def test_words(text, ratio, words):
    for module in (reinforce, rloo):
        scores = score(text, 0.0, module)
        assert scores == {"reward": pytest.approx(ratio), "ttr": pytest.approx(ratio), "words": words}
        for scale in (1.0, 0.5, 3.0):
            wanted = ratio - scale * (40 - words) / 40
            assert score(text, scale, module)["reward"] == pytest.approx(wanted)


def test_long_texts_are_not_punished():
    text = " ".join(f"{a}{b}" for a in "abcdef" for b in "ghijklmn")  # 48 different words
    assert score(text) == {"reward": 1.0, "ttr": 1.0, "words": 48}
    assert score(" ".join(text.split()[:40]))["reward"] == 1.0
    assert score(" ".join(text.split()[:39]))["reward"] == pytest.approx(1 - 1 / 40)


def test_ema_by_hand():
    assert ema_baseline([], 0.9) == 0
    assert ema_baseline([0.4], 0.9) == pytest.approx(0.4)
    assert ema_baseline([0.4, 0.7], 0.5) == pytest.approx((0.5 * 0.4 + 0.7) / 1.5)
    assert ema_baseline([0.2, 0.4, 0.9], 0.9) == pytest.approx((0.81 * 0.2 + 0.9 * 0.4 + 0.9) / 2.71)
    assert ema_baseline([0.2, 0.4, 0.9], 0.0) == pytest.approx(0.9)


def rewards_of(texts):
    return torch.tensor([score(text)["reward"] for text in texts])


@pytest.mark.parametrize("baseline", ["none", "mean", "ema", "scst"])
def test_baselines_in_the_loop(main, baseline):
    """With a learning rate of 0 the policy of the last step is at hand: its rewards and greedy texts can be made again."""
    g = main(f"reinforce.py {QUICK} --lr 0 --baseline {baseline} --ema-beta 0.5")
    rewards = rewards_of(g["texts"])
    assert torch.allclose(g["rewards"], rewards)
    earlier = [record["reward"] for record in g["history"]]
    assert earlier[2] == pytest.approx(rewards.mean().item())
    if baseline == "scst":
        greedy, *_ = g["sample"](g["model"], g["tokenizer"], g["prompts"], 24, greedy=True)
        expected = rewards - rewards_of(greedy)
    else:  # at the third step the average knows the first two batches, and not this one
        known = {"none": 0.0, "mean": rewards.mean(), "ema": (0.5 * earlier[0] + earlier[1]) / 1.5}
        expected = rewards - known[baseline]
    assert g["advantages"].shape == (4, 1) and torch.allclose(g["advantages"][:, 0], expected, atol=1e-6)
    with torch.no_grad():
        logp = g["completion_logp"](g["model"], g["ids"], g["attn"], g["mask"])
    lengths = [int(row.sum()) for row in g["mask"]]
    by_hand = -sum(expected[i] * logp[i, : lengths[i]].sum() for i in range(4)) / 4
    assert g["loss"].item() == pytest.approx(by_hand.item(), abs=1e-3)


def test_loss_by_hand():
    logp = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], requires_grad=True)
    loss = policy_gradient_loss(logp, torch.tensor([[2.0], [-1.0]]))
    assert loss.item() == pytest.approx(-(2.0 * -3.0 + -1.0 * -0.5) / 2)
    loss.backward()
    assert logp.grad.tolist() == [
        [-1.0, -1.0],
        [0.5, 0.5],
    ]  # what was good becomes likelier, each token alike


def test_leave_one_out():
    """Each against the mean of the others; the same as G / (G - 1) times the distance from the mean of all."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.3, 0.9, 0.6, 0.2])
    advantages = leave_one_out_advantages(rewards, 4)
    assert advantages.shape == (8, 1)
    for start in (0, 4):
        group = rewards[start : start + 4].tolist()
        for i in range(4):
            others = [r for j, r in enumerate(group) if j != i]
            got = advantages[start + i, 0].item()
            assert got == pytest.approx(group[i] - sum(others) / 3, abs=1e-6)
            assert got == pytest.approx(4 / 3 * (group[i] - sum(group) / 4), abs=1e-6)
        assert advantages[start : start + 4].sum().abs() < 1e-6


def test_rloo_loop(main, tiny):
    g = main("rloo.py --steps 2 --batch-size 3 --group-size 2 --max-new-tokens 24 --lr 1e-4")
    assert len(g["prompts"]) == 6 and g["prompts"][0::2] == g["prompts"][1::2]
    rewards = rewards_of(g["texts"])
    assert g["advantages"][:, 0].tolist() == pytest.approx(
        [rewards[i].item() - rewards[i ^ 1].item() for i in range(6)], abs=1e-6
    )
    assert g["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-4 / 2)
    assert g["optimizer"].state[next(g["model"].parameters())]["step"] == 2  # one update a batch
    fresh, _ = tiny("llama")
    assert not any(torch.equal(a, b) for a, b in zip(g["model"].parameters(), fresh.parameters()))
    last = g["history"][-1]
    parts = [score(text) for text in g["texts"]]
    assert last["ttr"] == pytest.approx(sum(p["ttr"] for p in parts) / 6)
    assert last["words"] == pytest.approx(sum(p["words"] for p in parts) / 6)


def test_training_and_evaluation_topics_differ(main):
    for module in (reinforce, rloo):
        both = module.TRAIN + module.TEST
        assert len(set(both)) == len(both) >= 26
        assert all("about 40 words" in prompt and words == 40 for prompt, words in both)
    for script, group in (("reinforce", ""), ("rloo", "--group-size 2")):
        g = main(f"{script}.py --steps 1 --batch-size 150 {group} --max-new-tokens 1")
        assert {*zip(g["prompts"], g["answers"])} == set(g["TRAIN"]) and len(g["TRAIN"]) >= 20
        assert not set(g["TRAIN"]) & set(g["TEST"]) and len(g["TEST"]) == 6


def test_no_day_in_the_prompt_and_no_pad_in_the_texts(tiny):
    """Llama's template writes the date: without date_string the same seed would give other numbers tomorrow."""
    model, tokenizer = tiny("llama")
    assert "strftime_now" in tokenizer.chat_template
    ids, attn = reinforce.encode_prompts(tokenizer, reinforce.PROMPTS[:2])
    for row, seen in zip(ids, attn):
        text = tokenizer.decode(row[seen == 1])
        assert "26 Jul 2024" in text and text.count("<|begin_of_text|>") == 1
        assert re.search(r"Write about 40 words about \w+\.<\|eot_id\|>.*assistant", text, re.DOTALL)


def test_each_of_llamas_three_ends_ends(tiny, monkeypatch):
    model, tokenizer = tiny("llama")
    ends = model.generation_config.eos_token_id
    assert len(ends) == 3
    for end in ends:
        monkeypatch.setattr(torch, "multinomial", lambda probs, n: torch.full((len(probs), n), end))
        texts, ids, attn, mask, finished = reinforce.sample(model, tokenizer, reinforce.PROMPTS[:2], 8)
        assert mask.tolist() == [[1.0], [1.0]] and texts == ["", ""] and finished.all()

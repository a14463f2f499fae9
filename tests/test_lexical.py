"""REINFORCE's baselines, RLOO's advantage, the type-token ratio and the Llama traits: catches a moving average that knows the batch
it is used on, a leave-one-out mean that leaves nobody out, a word counted wrongly, and a template that changes with the day.
"""

import re

import pytest
import reinforce
import rloo
import torch
from rloo import leave_one_out_advantages

QUICK = "--steps 3 --batch-size 4 --max-new-tokens 24"


def score(text, scale, module=reinforce):
    """score, as it is with --brevity-penalty-scale."""
    module.args = module.Args(brevity_penalty_scale=scale)
    return module.score(text, 40)


@pytest.mark.parametrize(
    "text, distinct, words",
    [
        ("", 0, 0),
        ("  \n ", 0, 0),
        ("123 4.5 !? --- _", 0, 0),
        ("One", 1, 1),
        ("The the THE tHe", 1, 4),
        ("Don't stop; don’t stop.", 3, 4),  # a straight and a curly apostrophe are two spellings
        ("It's its own 'quoted' word's", 5, 5),
        ("x1y x2y", 2, 4),  # digits part words
        ("Über über naïve naïve 東京", 3, 5),
        ("well-known, well known", 2, 4),
    ],
)
def test_words(text, distinct, words):
    """The penalty adds to the divisor: each missing word is `scale` words more that say nothing new."""
    for module in (reinforce, rloo):
        ratio = distinct / words if words else 0.0
        for scale in (0.0, 0.5, 1.0, 3.0):
            found = score(text, scale, module)
            reward = distinct / (words + scale * (40 - words)) if words else 0.0
            assert found == {"reward": pytest.approx(reward), "ttr": pytest.approx(ratio), "words": words}


DIFFERENT = [f"{a}{b}" for a in "abcdef" for b in "ghijklmn"]  # 48 words


@pytest.mark.parametrize(
    "words, ttr, reward",
    [  # at a scale of 0.5
        (DIFFERENT[:40], 1, 1),
        (DIFFERENT[:39], 1, 39 / 39.5),
        (DIFFERENT[:41], 1, 40 / 40.5),  # a word too many is as bad as one that is missing
        (DIFFERENT, 1, 40 / 44),
        (DIFFERENT[:20] * 2, 20 / 40, 20 / 40),
        (DIFFERENT[:40] + ["ag"] * 40, 1, 40 / 60),  # what comes after 40 words is not read, but counted
        (["ag"] * 40 + DIFFERENT[:40], 1 / 40, 1 / 60),
        (DIFFERENT[:2], 1, 2 / 21),
    ],
)
def test_length(words, ttr, reward):
    found = {"reward": pytest.approx(reward), "ttr": pytest.approx(ttr), "words": len(words)}
    assert score(" ".join(words), 0.5) == found
    assert score(" ".join(words), 0.0)["reward"] == pytest.approx(ttr)  # the bare ratio


def rewards_of(texts, scale):
    return torch.tensor([score(text, scale)["reward"] for text in texts])


@pytest.mark.parametrize("baseline", ["none", "mean", "ema", "scst"])
def test_baselines_in_the_loop(main, updates, baseline):
    """With a learning rate of 0 the policy of the last step is at hand: its rewards and greedy texts can be made again."""
    g = main(f"reinforce.py {QUICK} --lr 0 --baseline {baseline} --ema-beta 0.7 --brevity-penalty-scale 2")
    rewards = rewards_of(g["texts"], 2.0)
    assert torch.allclose(g["rewards"], rewards)
    first, second, third = [record["reward"] for record in g["history"]]
    assert third == pytest.approx(rewards.mean().item())
    if baseline == "scst":
        greedy, *_ = g["sample"](g["model"], g["tokenizer"], g["prompts"], 24, greedy=True)
        expected = rewards - rewards_of(greedy, 2.0)
    else:  # at the third step the average knows the first two batches, and not this one
        known = {"none": 0.0, "mean": rewards.mean(), "ema": 0.7 * first + 0.3 * second}
        expected = rewards - known[baseline]
    assert g["advantages"].shape == (4, 1) and torch.allclose(g["advantages"][:, 0], expected, atol=1e-6)
    logp = g["completion_logp"](g["model"], g["ids"], g["attn"], g["mask"])
    lengths = [int(row.sum()) for row in g["mask"]]
    by_hand = -sum(expected[i] * logp[i, : lengths[i]].sum() for i in range(4)) / 4
    assert g["loss"].item() == pytest.approx(by_hand.item(), abs=1e-3)
    assert_same_gradient(by_hand, g["model"], updates[-1])


def assert_same_gradient(loss, model, theirs):
    """Of a loss of our own and of the last update, which was scaled to a length of 1."""
    ours = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))])
    assert ours.norm() > 1 and (ours / ours.norm() - theirs).norm() < 1e-3


def test_the_average_starts_at_the_first_batch(main):
    """Whose mean is then the baseline of the first step and, but for ema_beta's share, of the second."""
    for steps in (1, 2):
        g = main(f"reinforce.py {QUICK} --steps {steps} --lr 0 --baseline ema --ema-beta 0.7")
        baselines = g["rewards"] - g["advantages"][:, 0]
        assert baselines.tolist() == pytest.approx([g["history"][0]["reward"]] * 4)


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
    scores = [score(text, g["args"].brevity_penalty_scale) for text in g["texts"]]
    expected = [scores[i]["reward"] - scores[i ^ 1]["reward"] for i in range(6)]
    assert g["advantages"][:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert g["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-4 * 2 / 5)
    assert g["optimizer"].state[next(g["model"].parameters())]["step"] == 2  # one update a batch
    fresh, _ = tiny("llama")
    assert not any(torch.equal(a, b) for a, b in zip(g["model"].parameters(), fresh.parameters()))
    for name in ("ttr", "words"):
        assert g["history"][-1][name] == pytest.approx(sum(s[name] for s in scores) / 6)


def test_rloo_gradient(main, updates):
    """With a learning rate of 0 the last gradient can be taken again: each log-prob of a whole completion times its advantage."""
    g = main("rloo.py --steps 1 --batch-size 2 --group-size 2 --max-new-tokens 24 --lr 0")
    logp = g["completion_logp"](g["model"], g["ids"], g["attn"], g["mask"])
    loss = -sum(a * logp[i][g["mask"][i] == 1].sum() for i, a in enumerate(g["advantages"][:, 0])) / 4
    assert g["loss"].item() == pytest.approx(loss.item(), abs=1e-3)
    assert_same_gradient(loss, g["model"], updates[-1])


def test_training_and_evaluation_topics_differ(main):
    """Four texts each of six topics are evaluated; the others are trained on."""
    for module in (reinforce, rloo):
        train, test = set(module.TRAIN), set(module.TEST)
        assert len(module.TRAIN) == len(train) == 18 and not train & test
        assert len(test) == 6 and all(module.TEST.count(example) == 4 for example in test)
        assert all("about 40 words" in prompt and words == 40 for prompt, words in train | test)
    for script, group in (("reinforce", ""), ("rloo", "--group-size 2")):
        g = main(f"{script}.py --steps 1 --batch-size 150 {group} --max-new-tokens 1 --micro-batch-size 150")
        assert {*zip(g["prompts"], g["answers"])} == set(g["TRAIN"])


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

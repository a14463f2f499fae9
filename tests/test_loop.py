"""The training loop itself, run in this process and looked at afterwards, as a notebook user would.

Catches what still learns and is wrong: groups that mix prompts, an old_logp made anew for each update, a reference that moves, a
learning rate that stays, metrics over padding, a gradient that is neither checked nor scaled.
"""

import json
import re
import sys
import time

import minimal_grpo
import pytest
import torch
from conftest import PRESENT
from transformers import PreTrainedTokenizerBase


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_grpo(main, tiny):
    g = main(
        "minimal_grpo.py --steps 3 --epsilon 0.001 --beta 0.5 --batch-size 8 --group-size 6 --micro-batch-size 48"
    )
    fresh, _ = tiny("qwen")
    assert g["model"].dtype == torch.float32 and not g["model"].training
    assert same(g["reference"], fresh) and not same(g["model"], fresh)
    assert not any(p.requires_grad for p in g["reference"].parameters())
    assert g["optimizer"].param_groups[0]["lr"] == pytest.approx(g["args"].lr / 3)
    assert g["optimizer"].state[next(g["model"].parameters())]["step"] == 3 * 2
    assert set(g["model"].parameters()) == set(g["optimizer"].param_groups[0]["params"])

    groups = [g["prompts"][i : i + 6] for i in range(0, 48, 6)]
    assert len(g["prompts"]) == 48 and all(len(set(group)) == 1 for group in groups)
    rewards = [minimal_grpo.score(text, answer)["reward"] for text, answer in zip(g["texts"], g["answers"])]
    assert g["rewards"].tolist() == rewards and 0 < sum(rewards) < 48
    for i in range(0, 48, 6):
        assert g["advantages"][i : i + 6].sum().abs() < 1e-4

    inputs = (g["logp"], g["old_logp"], g["ref_logp"], g["advantages"])
    token_loss, _ = minimal_grpo.grpo_loss(*inputs, 0.001, 0.5)
    assert g["loss"].item() == pytest.approx(token_loss[g["mask"] == 1].mean().item(), rel=1e-4)
    assert [record["step"] for record in g["history"]] == [0, 1, 2]
    last = g["history"][-1]
    assert g["old_logp"].requires_grad is False and (g["logp"] - g["old_logp"]).abs().max() > 1e-3
    assert last["clip_frac"] > 0.05, "with a range of 0.001 the second update must clip"
    lengths = [int(row.sum()) for row in g["mask"]]
    assert last["tokens"] == pytest.approx(sum(lengths) / 48) and last["finished"] == 1
    assert last["reward"] == pytest.approx(sum(rewards) / 48)
    with torch.no_grad():  # the KL of the last update, over real tokens only, from a model of our own
        ref_logp = minimal_grpo.completion_logp(fresh, g["ids"], g["attn"], g["mask"])
        r = [ref_logp[i, t] - g["logp"][i, t] for i in range(48) for t in range(lengths[i])]
        assert last["kl"] == pytest.approx(sum((x.exp() - x - 1).item() for x in r) / len(r), rel=1e-3)
        assert last["kl"] > 1e-4


def test_first_update_is_on_policy(main):
    """The ratio is exactly 1, nothing is clipped, and before the first step the KL is exactly 0."""
    g = main("minimal_grpo.py --steps 1 --update-epochs 1 --batch-size 2 --micro-batch-size 16")
    assert torch.equal(g["logp"], g["old_logp"]) and not g["old_logp"].requires_grad
    assert (g["history"][0]["kl"], g["history"][0]["clip_frac"]) == (0, 0)


def test_no_reference_at_beta_0(main):
    g = main("minimal_grpo.py --steps 2 --beta 0 --batch-size 2")
    assert g["reference"] is None and len(g["history"]) == 2 and "kl" not in g["history"][0]


def test_cut_off_completions_are_counted(main):
    """One that ends at the limit, with its end-of-turn token, is not cut off."""
    g = main("minimal_grpo.py --steps 1 --max-new-tokens 8")
    ends = g["model"].generation_config.eos_token_id
    ended = [any(token in ends for token in row) for row in g["ids"][:, -8:].tolist()]
    assert g["mask"].shape[1] == 8 and 0 < sum(ended) < 64
    assert g["history"][0]["finished"] == pytest.approx(sum(ended) / 64)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(main, tiny, monkeypatch, capsys):
    """A NaN advantage: the weights are sound, so that only the guard at the gradient can stop it."""
    std = torch.Tensor.std
    monkeypatch.setattr(torch.Tensor, "std", lambda self, *a, **k: std(self, *a, **k) * float("nan"))
    stepped = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: stepped.append(self))
    with pytest.raises(RuntimeError, match="non-finite"):
        main("minimal_grpo.py --steps 2 --batch-size 2")
    assert not stepped and "after 2 steps" not in capsys.readouterr().out


@pytest.mark.parametrize("script", PRESENT)
def test_the_rate_rises_over_five_steps_and_falls_to_0(main, monkeypatch, script):
    """The peak times 1/5, 2/5, ... and, once that is less, times what is left of the steps."""
    rates, step = [], torch.optim.Adam.step

    def watched(self):
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(1.0))
    flags = "--lr 3e-7 --batch-size 2 --max-new-tokens 2"
    flags += " --update-epochs 1 --group-size 2" * (script in ("minimal_grpo", "gsm8k_grpo"))
    flags += " --eval-size 0" * script.startswith("gsm8k")
    flags += " --update-epochs 1 --critic-lr 5e-7" * (script == "minimal_ppo")
    flags += " --update-epochs 1 --sft-steps 8 --sft-lr 7e-7" * (script == "gsm8k_sft_grpo")
    main(f"{script}.py --steps 8 {flags}")
    shape = [0.2, 0.4, 0.6, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    wanted = [3e-7 * share for share in shape]
    if script == "minimal_ppo":
        wanted = [rate for share in wanted for rate in (share, 5e-7)]
    if script == "gsm8k_sft_grpo":
        wanted = [7e-7 * share for share in shape] + wanted
    assert rates == pytest.approx(wanted)


@pytest.mark.parametrize("script", [name for name in PRESENT if name.startswith("minimal")])
def test_gradients_are_scaled_to_1(main, updates, script):
    """With a learning rate of 0 SFT's last gradient can be taken again."""
    critic = " --critic-lr 0" if script == "minimal_ppo" else ""
    g = main(f"{script}.py --steps 2 --lr 0 --batch-size 4{critic}")
    assert len(updates) >= 2 and all(gradient.norm() <= 1 + 1e-4 for gradient in updates)
    if script == "minimal_sft":
        logp = g["completion_logp"](g["model"], g["ids"], g["attn"], g["mask"])
        grads = torch.autograd.grad(-logp[g["mask"] == 1].mean(), list(g["model"].parameters()))
        ours = torch.cat([x.flatten() for x in grads])
        assert ours.norm().item() == pytest.approx(g["grad_norm"].item(), rel=1e-3)
        assert (ours / ours.norm() - updates[-1]).norm() < 1e-3


@pytest.mark.parametrize("script", PRESENT)
def test_each_update_starts_without_a_gradient(main, monkeypatch, script):
    """Seen at the first backward pass after each optimizer step, of the policy and of PPO's critic."""
    backward, step, state = torch.Tensor.backward, torch.optim.Adam.step, {"stepped": True, "seen": 0}

    def watched(self):
        g = sys._getframe(1).f_globals
        if state["stepped"]:
            parts = [g[name] for name in ("model", "critic") if name in g]
            assert all(p.grad is None for part in parts for p in part.parameters())
            state["seen"] += 1
        state["stepped"] = False
        backward(self)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (state.update(stepped=True), step(self))[1])
    gsm8k = " --eval-size 0" if script.startswith("gsm8k") else ""
    main(f"{script}.py --steps 3 --batch-size 2 --max-new-tokens 8{gsm8k}")
    assert state["seen"] >= 3


@pytest.mark.parametrize("script", ["rloo", "minimal_grpo", "gsm8k_grpo", "gsm8k_sft_grpo"])
def test_share_of_groups_with_equal_rewards(main, script):
    """Counted here from the rewards."""
    gsm8k = " --eval-size 0 --max-new-tokens 60" if script.startswith("gsm8k") else " --max-new-tokens 24"
    g = main(f"{script}.py --steps 1 --batch-size 12 --group-size 2{gsm8k}")
    groups = [g["rewards"][i : i + 2].tolist() for i in range(0, 24, 2)]
    flat = sum(a == b for a, b in groups)
    assert g["history"][-1]["zero_std"] == pytest.approx(flat / 12) and (script == "rloo" or 0 < flat < 12)


@pytest.mark.parametrize("script", [name for name in PRESENT if name not in ("minimal_sft", "minimal_dpo")])
def test_entropy_and_seconds(main, tiny, script):
    """The entropy is the mean of -log-prob over the tokens as they were drawn; the last step starts from the weights of lr 0."""
    gsm8k = " --eval-size 0 --sft-steps 0" if script == "gsm8k_sft_grpo" else ""
    gsm8k = gsm8k or (" --eval-size 0" if script == "gsm8k_grpo" else "")
    start = time.time()
    g = main(f"{script}.py --steps 2 --lr 0 --batch-size 4 --max-new-tokens 24{gsm8k}")
    passed = time.time() - start
    fresh, _ = tiny("llama" if script in ("reinforce", "rloo") else "qwen")
    with torch.no_grad():
        logp = g["completion_logp"](fresh, g["ids"], g["attn"], g["mask"])
    last = g["history"][-1]
    assert (
        last["entropy"] == pytest.approx(-logp[g["mask"] == 1].mean().item(), rel=1e-3)
        and last["entropy"] > 0.05
    )
    seconds = [record["seconds"] for record in g["history"]]
    assert all(x > 0 for x in seconds) and sum(seconds) < passed


def reward_of_a_sum(prompt, text):
    """Split at the tags: just one opening and one closing one, and the sum between them."""
    parts = re.split("(</?answer>)", text)
    a, b = map(int, re.findall(r"\d", prompt))
    return {"reward": float(parts[1::2] == ["<answer>", "</answer>"] and parts[2] == str(a + b))}


def scores_of_a_text(prompt, text):
    """With a --brevity-penalty-scale of 0.5: half a word for each word missing or too many."""
    words = re.sub("[^a-z' ]", " ", text.lower()).split()
    distinct, counted = len(set(words[:40])), len(words[:40])
    reward = distinct / (counted + abs(len(words) - 40) / 2)
    return {"reward": reward, "ttr": distinct / counted, "words": len(words)}


@pytest.mark.parametrize("script", [name for name in PRESENT if not name.startswith("gsm8k")])
def test_evaluation(main, tiny, tmp_path, monkeypatch, capsys, script):
    """Means over all of TEST at temperature 1: drawn again with the same random numbers and counted by hand; the last is shown."""
    states, template = [], PreTrainedTokenizerBase.apply_chat_template

    def watched(self, chats, **kwargs):
        if kwargs.get("add_generation_prompt"):
            states.append(torch.get_rng_state())
        return template(self, chats, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", watched)
    sums = script.startswith("minimal")
    # at the higher rate the trained model writes another text; words would no longer be plain enough to count
    own = "--lr 1e-5 --batch-size 16" if sums else "--lr 1e-6 --batch-size 2 --brevity-penalty-scale 0.5"
    g = main(f"{script}.py --steps 1 {own} --log {tmp_path / 'log'}")
    first, *_, last = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    lines = capsys.readouterr().out.splitlines()
    prompts = [prompt for prompt, _ in g["TEST"]]
    assert len(prompts) == (100 if sums else 24)
    before, after = tiny("qwen" if sums else "llama")[0], g["model"]
    for record, line, state, model in ((first, 2, states[0], before), (last, -2, states[-1], after)):
        torch.set_rng_state(state)
        texts, *_ = g["sample"](model, g["tokenizer"], prompts, g["args"].max_new_tokens)
        scores = [(reward_of_a_sum if sums else scores_of_a_text)(*pair) for pair in zip(prompts, texts)]
        means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
        assert record == {"step": record["step"], "eval": pytest.approx({"n": len(prompts), **means})}
        shown = "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        assert lines[line] == f"after {record['step']} steps, sampled, {len(prompts)} prompts: {shown}"
        assert lines[line + 1] == f"    {prompts[-1]!a} -> {texts[-1]!a}"

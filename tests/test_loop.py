"""The training loop itself, run in this process and looked at afterwards, as a notebook user would.

Catches what still learns and is wrong: groups that mix prompts, an old_logp made anew for each update, a reference that moves, a
learning rate that stays, metrics over padding, a gradient that is neither checked nor scaled.
"""

import json
import re

import minimal_grpo
import pytest
import torch
from conftest import PRESENT


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_grpo(main, tiny):
    g = main("minimal_grpo.py --steps 3 --lr 2e-5 --epsilon 0.001 --beta 0.5 --batch-size 4 --group-size 6")
    fresh, _ = tiny("qwen")
    assert (
        g["model"].dtype == torch.float32
        and not g["model"].training
        and g["tokenizer"].padding_side == "left"
    )
    assert same(g["reference"], fresh) and not same(g["model"], fresh)
    assert not any(p.requires_grad for p in g["reference"].parameters())
    assert g["optimizer"].param_groups[0]["lr"] == pytest.approx(2e-5 / 3)
    assert g["optimizer"].state[next(g["model"].parameters())]["step"] == 3 * 2
    assert {id(p) for p in g["model"].parameters()} == {
        id(p) for group in g["optimizer"].param_groups for p in group["params"]
    }

    groups = [g["prompts"][i : i + 6] for i in range(0, 24, 6)]
    assert len(g["prompts"]) == 24 and all(len(set(group)) == 1 for group in groups)
    rewards = [minimal_grpo.score(text, answer)["reward"] for text, answer in zip(g["texts"], g["answers"])]
    assert g["rewards"].tolist() == rewards and 0 < sum(rewards) < 24
    for i in range(0, 24, 6):
        assert g["advantages"][i : i + 6].sum().abs() < 1e-4

    inputs = (g["logp"], g["old_logp"], g["ref_logp"], g["advantages"])
    token_loss, _ = minimal_grpo.grpo_loss(*inputs, 0.001, 0.5)
    assert g["loss"].item() == pytest.approx(token_loss[g["mask"] == 1].mean().item(), rel=1e-4)
    assert [record["step"] for record in g["history"]] == [0, 1, 2]
    last = g["history"][-1]
    assert g["old_logp"].requires_grad is False and (g["logp"] - g["old_logp"]).abs().max() > 1e-3
    assert last["clip_frac"] > 0.05, "with a range of 0.001 the second update must clip"
    lengths = [int(row.sum()) for row in g["mask"]]
    assert last["tokens"] == pytest.approx(sum(lengths) / 24) and last["finished"] == 1
    assert last["reward"] == pytest.approx(sum(rewards) / 24)
    with torch.no_grad():  # the KL of the last update, over real tokens only, from a model of our own
        ref_logp = minimal_grpo.completion_logp(fresh, g["ids"], g["attn"], g["mask"])
        r = [ref_logp[i, t] - g["logp"][i, t] for i in range(24) for t in range(lengths[i])]
        assert last["kl"] == pytest.approx(sum((x.exp() - x - 1).item() for x in r) / len(r), rel=1e-3)
        assert last["kl"] > 1e-4


def test_first_update_is_on_policy(main):
    """One update a batch: the ratio is 1, nothing is clipped, and before the first update the KL is exactly 0."""
    g = main("minimal_grpo.py --steps 1 --update-epochs 1")
    assert torch.equal(g["logp"].detach(), g["old_logp"])
    assert (g["history"][0]["kl"], g["history"][0]["clip_frac"]) == (0, 0)


def test_no_reference_at_beta_0(main):
    g = main("minimal_grpo.py --steps 2 --beta 0")
    assert g["reference"] is None and len(g["history"]) == 2 and "kl" not in g["history"][0]


def test_cut_off_completions_are_counted(main):
    g = main("minimal_grpo.py --steps 1 --max-new-tokens 4")
    assert g["mask"].shape[1] == 4 and 0 < g["history"][0]["finished"] < 1
    ended = [bool((row == 0).any()) or text.isdigit() for row, text in zip(g["mask"], g["texts"])]
    assert g["history"][0]["finished"] == pytest.approx(sum(ended) / len(ended))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(main, tiny, monkeypatch, capsys):
    """A NaN advantage: the weights are sound, so that only the guard at the gradient can stop it."""
    std = torch.Tensor.std
    monkeypatch.setattr(torch.Tensor, "std", lambda self, *a, **k: std(self, *a, **k) * float("nan"))
    stepped = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: stepped.append(self))
    with pytest.raises(RuntimeError, match="non-finite"):
        main("minimal_grpo.py --steps 2")
    assert not stepped and "after 2 steps" not in capsys.readouterr().out


@pytest.mark.parametrize("script", [name for name in PRESENT if name.startswith("minimal")])
def test_gradients_are_made_anew_and_scaled_to_1(main, script):
    """With a learning rate of 0 the last gradient can be taken again: from the last loss alone, scaled down to 1."""
    critic = " --critic-lr 0" if script == "minimal_ppo" else ""
    g = main(f"{script}.py --steps 2 --lr 0 --batch-size 6{critic}")
    for part in ("model", "critic") if critic else ("model",):
        norm = torch.stack([p.grad.norm() for p in g[part].parameters()]).norm()
        assert norm <= 1 + 1e-4
    if script == "minimal_sft":
        logp = g["completion_logp"](g["model"], g["ids"], g["attn"], g["mask"])
        grads = torch.autograd.grad(-logp[g["mask"] == 1].mean(), list(g["model"].parameters()))
        assert torch.stack([x.norm() for x in grads]).norm().item() == pytest.approx(
            g["grad_norm"].item(), rel=1e-3
        )


@pytest.mark.parametrize("script", [name for name in PRESENT if not name.startswith("gsm8k")])
def test_each_update_starts_without_a_gradient(main, monkeypatch, script):
    """Seen by the optimizer's own step: what it applies is the gradient of one backward pass, not of all so far."""
    backward, passes = torch.Tensor.backward, []
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: (passes.append(self), backward(self))[1])
    cleared, zero_grad = [], torch.optim.Adam.zero_grad
    monkeypatch.setattr(
        torch.optim.Adam, "zero_grad", lambda self: (cleared.append(len(passes)), zero_grad(self))[1]
    )
    main(f"{script}.py --steps 3 --batch-size 2")
    each = 2 if script == "minimal_ppo" else 1  # policy and critic
    assert cleared == [n for n in range(len(passes)) for _ in range(each)] and len(passes) >= 3


@pytest.mark.parametrize("script", [name for name in PRESENT if not name.startswith("gsm8k")])
def test_evaluation(main, tiny, tmp_path, capsys, script):
    """Means over all of TEST, greedy, counted again here one completion at a time; the last one is shown."""
    g = main(f"{script}.py --steps 1 --batch-size 2 --max-new-tokens 40 --log {tmp_path / 'log'}")
    first, *_, last = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    out = capsys.readouterr().out
    qwen = script.startswith("minimal")
    prompts = [prompt for prompt, _ in g["TEST"]]
    assert len(prompts) == (100 if qwen else 6)
    for record, model in ((first, tiny("qwen" if qwen else "llama")[0]), (last, g["model"])):
        texts = [g["sample"](model, g["tokenizer"], [q], 40, greedy=True)[0][0] for q in prompts]
        if qwen:
            right = [
                re.fullmatch(r"[^<>]*<answer>(\d+)</answer>[^<>]*", t) for t in texts
            ]  # tiny-qwen writes no other tag
            sums = [m and int(m[1]) == sum(map(int, re.findall(r"\d", q))) for m, q in zip(right, prompts)]
            expected = {"reward": sum(map(bool, sums)) / 100}
        else:
            words = [re.sub(r"[^a-z' ]", " ", t.lower()).split() for t in texts]
            ttr = [len(set(w)) / len(w) for w in words]
            rewards = [t - max(0, 40 - len(w)) / 40 for t, w in zip(ttr, words)]
            expected = {"reward": sum(rewards) / 6, "ttr": sum(ttr) / 6, "words": sum(map(len, words)) / 6}
        assert record["eval"] == {name: pytest.approx(x, abs=1e-6) for name, x in expected.items()}
        assert f"{prompts[-1]!r} -> {texts[-1]!r}" in out
        assert all(f"{name} {x:.4g}" in out for name, x in expected.items())

"""PPO's advantage, losses and critic: catches values off by one token, a bootstrap past the end, returns taken after whitening, a
reward on the wrong token, a critic that no optimizer knows, and one that is not worth its memory.
"""

import math

import minimal_grpo
import minimal_ppo
import pytest
import torch

MASK = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
VALUES = torch.tensor([[0.5, 0.2, -0.1, 0.4], [0.3, 0.6, 0.0, 0.0], [0.9, 0.0, 0.0, 0.0]])
REWARDS = torch.tensor([[0.1, 0.0, -0.2, 1.0], [-0.1, 1.0, 0.0, 0.0], [0.7, 0.0, 0.0, 0.0]])
LENGTHS = [4, 2, 1]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_gae_as_a_sum(gamma, lam):
    """1506.02438, eq. 16: the discounted sum of the deltas up to the row's own end, where the value is 0."""
    advantages, returns = minimal_ppo.gae(REWARDS, VALUES, gamma, lam)
    for i, n in enumerate(LENGTHS):
        v = [*VALUES[i, :n].tolist(), 0.0]
        deltas = [REWARDS[i, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        assert advantages[i, :n].tolist() == pytest.approx(expected, abs=1e-6)
        assert returns[i, :n].tolist() == pytest.approx([a + v[t] for t, a in enumerate(expected)], abs=1e-6)
        assert advantages[i, n:].abs().sum() == 0


def test_gae_without_discount_is_what_came_less_what_was_expected():
    advantages, returns = minimal_ppo.gae(REWARDS, VALUES, 1.0, 1.0)
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            assert returns[i, t].item() == pytest.approx(REWARDS[i, t:].sum().item(), abs=1e-6)
            assert advantages[i, t].item() == pytest.approx(
                REWARDS[i, t:].sum().item() - VALUES[i, t].item(), abs=1e-6
            )


def test_loss_written_out():
    torch.manual_seed(0)
    logp, old, advantages = (torch.randn(3, 4) for _ in range(3))
    token_loss, metrics = minimal_ppo.ppo_loss(logp, old, advantages, 0.2)
    loss = (token_loss * MASK).sum() / 7
    policy, clipped = 0.0, 0
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            ratio, a = math.exp(logp[i, t] - old[i, t]), advantages[i, t].item()
            bounded = min(max(ratio, 0.8), 1.2)
            policy += min(ratio * a, bounded * a)
            clipped += bounded * a < ratio * a
    assert loss.item() == pytest.approx(-policy / 7, abs=1e-6)
    found = {key: (metric * MASK).sum().item() / 7 for key, metric in metrics.items()}
    assert found == pytest.approx({"clip_frac": clipped / 7}, abs=1e-6)


@pytest.mark.parametrize(
    "ratio, advantage, flows",
    [(1.5, 1, False), (0.5, -1, False), (1.5, -1, True), (0.5, 1, True), (1.1, 1, True)],
)
def test_clip(ratio, advantage, flows):
    logp, one = torch.tensor([[math.log(ratio)]], requires_grad=True), torch.ones(1, 1)
    minimal_ppo.ppo_loss(logp, 0 * one, advantage * one, 0.2)[0].backward()
    assert logp.grad.item() == pytest.approx(-ratio * advantage if flows else 0)


def test_a_value_is_of_what_comes_before_its_token(tiny):
    critic, tokenizer = tiny("qwen")
    torch.manual_seed(0)
    prompts = ["What is 3 + 8?", "Hi there, what is it?"] * 2
    _, ids, attn, mask, _ = minimal_ppo.sample(critic, tokenizer, prompts, 8)
    critic.lm_head.weight = torch.nn.Parameter(torch.randn(1, 128))
    values = minimal_ppo.critic_values(critic, ids, attn, mask)
    for i in range(len(ids)):
        row, n = ids[i][attn[i] == 1], int(mask[i].sum())
        for t in range(n):  # the text up to token t, without it, run alone
            hidden = critic.model(row[None, : len(row) - n + t]).last_hidden_state[0, -1]
            alone = hidden @ critic.lm_head.weight[0]
            assert values[i, t].item() == pytest.approx(alone.item(), abs=1e-2, rel=1e-4)
        assert (values[i, n:] == 0).all()


OPTIMIZERS = {"optimizer": "model", "critic_optimizer": "critic"}


def test_loop(main, tiny):
    g = main(
        "minimal_ppo.py --steps 2 --micro-batch-size 64 --critic-lr 1e-4 --beta 0.3 --gamma 0.9 --lam 0.7"
    )
    fresh, _ = tiny("qwen")
    for name, p in fresh.named_parameters():
        assert torch.equal(p, g["reference"].get_parameter(name)), f"{name} of the reference moved"
        if p.dim() == 2:  # the gains are too large to move by lr
            assert not torch.equal(p, g["model"].get_parameter(name)), f"{name} of the policy did not move"
    for name, p in g["critic"].named_parameters():
        start = torch.zeros_like(p) if name == "lm_head.weight" else fresh.get_parameter(name)
        assert p.dim() == 1 or not torch.equal(p, start), f"{name} of the critic did not move"
    for name, trained in OPTIMIZERS.items():
        assert set(g[name].param_groups[0]["params"]) == set(g[trained].parameters())
    assert [g[name].param_groups[0]["lr"] for name in OPTIMIZERS] == pytest.approx(
        [g["args"].lr * 2 / 5, 1e-4]
    )
    assert g["critic_optimizer"].state[g["critic"].lm_head.weight]["step"] == 4

    rewards = [minimal_grpo.score(t, a)["reward"] for t, a in zip(g["texts"], g["answers"])]
    with torch.no_grad():
        ref_logp = minimal_ppo.completion_logp(fresh, g["ids"], g["attn"], g["mask"])
    for i, row in enumerate(g["mask"].sum(1).int().tolist()):
        for t in range(g["mask"].shape[1]):
            kl = (g["old_logp"][i, t] - ref_logp[i, t]).item() if t < row else 0.0
            expected = -0.3 * kl + (rewards[i] if t == row - 1 else 0.0)
            assert g["token_rewards"][i, t].item() == pytest.approx(expected, abs=1e-5)
    kls = (g["old_logp"] - ref_logp)[g["mask"] == 1]
    assert g["history"][-1]["kl"] == pytest.approx(kls.mean().item(), abs=1e-5)
    real = g["advantages"][g["mask"] == 1]
    assert real.mean().abs() < 1e-5 and 0.999 < real.std().item() < 1  # 1e-4 in the divisor


def test_what_the_last_update_saw(main, updates):
    """One update a batch, so that its log-probs and values are those of sampling time, at a second step (values not 0)."""
    flags = "--steps 2 --batch-size 16 --micro-batch-size 16 --update-epochs 1 --gamma 0.9 --lam 0.7 --critic-lr 1e-4"
    g = main(f"minimal_ppo.py {flags}")
    assert torch.equal(g["values"].detach(), g["old_values"]) and g["old_values"].abs().max() > 1e-3
    for i, n in enumerate(g["mask"].sum(1).int().tolist()):
        v, r = [*g["old_values"][i, :n].tolist(), 0.0], g["token_rewards"][i].tolist()
        deltas = [r[t] + 0.9 * v[t + 1] - v[t] for t in range(n)]
        returns = [sum(0.63 ** (k - t) * deltas[k] for k in range(t, n)) + v[t] for t in range(n)]
        assert g["returns"][i, :n].tolist() == pytest.approx(returns, abs=1e-5)
    errors = [(g["old_values"] - g["returns"])[i, t].item() for i, t in g["mask"].nonzero().tolist()]
    by_hand = sum(error**2 / 2 for error in errors) / len(errors)
    assert g["value_loss"].item() == pytest.approx(by_hand, rel=1e-4)
    assert g["history"][-1]["value_loss"] == pytest.approx(by_hand, rel=1e-4)


def test_the_critic_is_trained_on_the_squared_error(main, updates):
    """With both rates 0 its last gradient can be taken again, from one pass over the whole batch."""
    g = main("minimal_ppo.py --steps 1 --lr 0 --critic-lr 0 --batch-size 16")
    values = g["critic_values"](g["critic"], g["ids"], g["attn"], g["mask"])
    loss = ((values - g["returns"]) ** 2)[g["mask"] == 1].mean() / 2
    ours = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(g["critic"].parameters()))])
    ours *= min(1.0, 1 / ours.norm().item())
    assert ours.norm() > 0.01 and (ours - updates[-1]).norm() < 1e-3 * ours.norm()


def test_the_clip_range_is_the_flag(main):
    g = main("minimal_ppo.py --steps 1 --batch-size 16 --micro-batch-size 16 --epsilon 0.001")
    inputs = (g[name] for name in ("logp", "old_logp", "advantages"))
    token_loss, _ = minimal_ppo.ppo_loss(*inputs, 0.001)
    loss = token_loss[g["mask"] == 1].mean()
    assert g["loss"].item() == pytest.approx(loss.item(), abs=1e-5) and g["history"][0]["clip_frac"] > 0.05


def test_first_values_are_0_and_returns_are_not_whitened(main):
    """With a critic that starts at 0, gamma = lam = 1 and no KL, each return is the completion's reward itself."""
    g = main("minimal_ppo.py --steps 1 --beta 0 --lam 1 --update-epochs 1")
    assert g["reference"] is None and "kl" not in g["history"][0] and (g["old_values"] == 0).all()
    assert torch.allclose(g["returns"], g["rewards"][:, None] * g["mask"])
    assert 0 < g["rewards"].mean() < 1


def test_the_critic_is_worth_its_cost(main):
    """After eight batches the critic's squared error is below the variance of the returns: it knows more than their mean."""
    g = main("minimal_ppo.py --steps 8 --batch-size 32 --micro-batch-size 32")
    torch.manual_seed(1)
    prompts, answers = zip(*minimal_ppo.TEST * 3)
    with torch.no_grad():
        texts, ids, attn, mask, _ = g["sample"](g["model"], g["tokenizer"], prompts, 48)
        values = minimal_ppo.critic_values(g["critic"], ids, attn, mask)
        logp, ref_logp = (minimal_ppo.completion_logp(g[m], ids, attn, mask) for m in ("model", "reference"))
    rewards = torch.tensor([minimal_grpo.score(t, a)["reward"] for t, a in zip(texts, answers)])
    returns = (-0.05 * (logp - ref_logp)).flip(1).cumsum(1).flip(1) + rewards[
        :, None
    ]  # all that is still to come
    assert ((values - returns)[mask == 1] ** 2).mean() < 0.9 * returns[mask == 1].var()

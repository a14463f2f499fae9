"""GRPO's advantage and loss against sums written out by hand: catches a turned sign, clip, KL or normaliser."""

import math

import pytest
import torch
from minimal_grpo import group_advantages, grpo_loss
from rloo import leave_one_out_advantages

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])  # four tokens in all
LOGP = torch.tensor([[-1.0, -0.5, -2.0], [-0.3, -9.0, -9.0]])
OLD = torch.tensor([[-1.5, -0.5, -1.0], [-0.35, -1.0, -1.0]])
REF = torch.tensor([[-1.2, -0.4, -2.5], [-0.9, -1.0, -1.0]])
ADVANTAGES = torch.tensor([[1.5], [-0.5]])


def by_hand(epsilon, beta):
    total, kls, clipped = 0.0, 0.0, 0
    for i in range(2):
        for t in range(3 if i == 0 else 1):
            p, old, ref, a = LOGP[i, t].item(), OLD[i, t].item(), REF[i, t].item(), ADVANTAGES[i, 0].item()
            ratio = math.exp(p - old)
            bounded = min(max(ratio, 1 - epsilon), 1 + epsilon)
            kl = math.exp(ref - p) - (ref - p) - 1
            total += min(ratio * a, bounded * a) - beta * kl
            kls += kl
            clipped += bounded * a < ratio * a
    return -total / 4, kls / 4, clipped / 4


@pytest.mark.parametrize("epsilon, beta", [(0.2, 0.0), (0.2, 0.04), (0.05, 1.0)])
def test_loss_written_out(epsilon, beta):
    token_loss, metrics = grpo_loss(LOGP, OLD, REF, ADVANTAGES, epsilon, beta)
    loss, kl, clip_frac = by_hand(epsilon, beta)
    assert token_loss.shape == MASK.shape and mean(token_loss) == pytest.approx(loss, abs=1e-6)
    assert mean(metrics.pop("clip_frac")) == pytest.approx(clip_frac, abs=1e-6)
    if beta:  # without a reference there is no distance from it to report
        assert mean(metrics.pop("kl")) == pytest.approx(kl, abs=1e-6)
    assert not metrics


def mean(values):
    """Over the four tokens."""
    return (values * MASK).sum().item() / 4


def gradient(log_ratio, advantage, epsilon=0.2, ref=None, beta=0.0):
    logp = torch.tensor([[-1.0]], requires_grad=True)
    ref_logp = logp.detach() if ref is None else torch.tensor([[ref]])
    old_logp = logp.detach() - log_ratio
    token_loss, _ = grpo_loss(logp, old_logp, ref_logp, torch.tensor([[advantage]]), epsilon, beta)
    token_loss.backward()
    return logp.grad.item()


def test_gradient_signs_and_clip():
    assert gradient(0.0, 2.0) == pytest.approx(-2.0)  # descent makes the token likelier
    assert gradient(0.0, -2.0) == pytest.approx(2.0)
    assert gradient(0.5, 2.0) == 0  # gained enough already
    assert gradient(-0.5, -2.0) == 0  # lost enough already
    assert gradient(0.5, -2.0) == pytest.approx(2.0 * math.exp(0.5))  # the wrong way: never clipped
    assert gradient(-0.5, 2.0) == pytest.approx(-2.0 * math.exp(-0.5))
    assert gradient(0.1, 2.0) == pytest.approx(-2.0 * math.exp(0.1))  # inside the range


def test_kl_pulls_towards_the_reference():
    too_likely, too_unlikely = (gradient(0.0, 0.0, ref=ref, beta=0.1) for ref in (-3.0, -0.2))
    assert too_likely == pytest.approx(0.1 * (1 - math.exp(-2.0))) and too_likely > 0  # descent takes it down
    assert too_unlikely == pytest.approx(0.1 * (1 - math.exp(0.8))) and too_unlikely < 0


def test_kl_is_the_kl():
    """Averaged over what the policy draws, each token with its probability, the estimate is KL(policy || reference)."""
    p, q = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]), torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25])
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist()))
    column = p.log()[:, None]
    _, metrics = grpo_loss(column, column, q.log()[:, None], torch.zeros(5, 1), 0.2, 0.04)
    assert (metrics["kl"] >= 0).all()
    assert (metrics["kl"] * p[:, None]).sum().item() == pytest.approx(exact, abs=1e-6)
    _, same = grpo_loss(column, column, column, torch.zeros(5, 1), 0.2, 0.04)
    assert (same["kl"] == 0).all()


def test_advantages_by_hand():
    got = group_advantages(torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0, 4.0, 4.0, 6.0]), 4)
    std = math.sqrt(8 / 3)  # of 2 4 4 6: squared distances 4 0 0 4, over three
    assert got.shape == (8, 1)
    assert got[:4, 0].tolist() == pytest.approx([-0.5, 1.5, -0.5, -0.5], abs=1e-3)
    assert got[4:, 0].tolist() == pytest.approx([-2 / std, 0, 0, 2 / std], abs=1e-3)


@pytest.mark.parametrize("advantages", [group_advantages, leave_one_out_advantages])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_no_advantage_where_all_agree(advantages, size):
    """Exactly none for 0 and 1. A mean of eight rewards of 1.2 is not 1.2 in float32: that rounding stays small."""
    for reward in (0.0, 1.0):
        assert (advantages(torch.full((2 * size,), reward), size) == 0).all()
    for reward in (0.1, 1.2, -0.4):
        assert advantages(torch.full((2 * size,), reward), size).abs().max() < 2e-3

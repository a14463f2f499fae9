"""The gymnasium variant: catches a move in the wrong episode or at the wrong time, an advantage that looks past an episode's end, an action
that is not one, and a log-prob of a move that is not the one it was drawn with. The package itself is replaced by a walk along a line.
"""

import json
import sys
import types

import numpy
import pytest
import torch
from conftest import patched

LIMIT = 7


class Walk:
    """Actions 0, 1, 2 go left, go right, stay; over beyond 0.5, or after .limit moves. What happened is in .moves."""

    def __init__(self, start, limit):
        self.start, self.limit = start, limit
        self.spec = types.SimpleNamespace(id="Walk-v0", max_episode_steps=LIMIT + 2)
        self.action_space = types.SimpleNamespace(n=3)

    def reset(self, seed):
        self.seed = seed
        self.x, self.moves = self.start, []
        return numpy.array([self.x, -1.0], dtype=numpy.float32), {}

    def step(self, action):
        assert not self.moves or not (self.moves[-1][3] or self.moves[-1][4]), "it was over"
        before = self.x
        self.x += (-0.2, 0.2, 0.0)[action]
        terminated, truncated = self.x > 0.5, len(self.moves) + 1 == self.limit
        self.moves.append((before, action, 1 + action / 8, terminated, truncated))
        return numpy.array([self.x, -1.0], dtype=numpy.float32), *self.moves[-1][2:], {}


@pytest.fixture
def made(monkeypatch):
    """All environments that were made, in their order: the batch's, then 20 for each evaluation."""
    made = []

    def make(name):
        assert name == "Walk-v0"
        made.append(Walk(len(made) % 5 / 5 - 1.0, LIMIT if len(made) % 5 else 4))
        return made[-1]

    monkeypatch.setitem(sys.modules, "gymnasium", types.SimpleNamespace(make=make))
    return made


FLAGS = "--env Walk-v0 --steps 2 --batch-size 6 --max-moves 5 --update-epochs 1 --seed 1"


def test_an_episode_is_a_row(made, main, updates, monkeypatch, tmp_path):
    drawn, multinomial = [], torch.multinomial

    def watched(probs, n):
        drawn.append(probs)
        return multinomial(probs, n)

    monkeypatch.setattr(torch, "multinomial", watched)
    log = tmp_path / "log"
    g = main(f"{patched('gymnasium_ppo', tmp_path)} {FLAGS} --log {log}")
    batch, first, last = made[:6], made[6:26], made[26:]
    tokenizer, logp = g["tokenizer"], g["old_logp"].squeeze(1)

    lengths = [len(env.moves) for env in batch]
    over = [env.moves[-1][3] for env in batch]
    assert len(set(lengths)) > 1 and max(lengths) == 5 and not all(over) and any(over), (
        "some end, some are cut off"
    )
    moves = [(t, e) for t in range(5) for e in range(6) if t < lengths[e]]
    assert g["played"].nonzero().tolist() == [list(move) for move in moves]
    assert g["history"][1]["moves"] == pytest.approx(sum(lengths) / 6)
    assert g["ids"].shape[0] == sum(lengths) and g["mask"].shape == (
        sum(lengths),
        1,
    )
    probs = torch.cat(drawn[-5:])  # of the second step
    actions = [tokenizer.convert_tokens_to_ids(str(action)) for action in range(3)]
    assert torch.allclose(probs[:, actions].sum(1), torch.ones(len(probs)))
    for row, (t, e) in enumerate(moves):
        before, action, reward, *_ = batch[e].moves[t]
        prompt = tokenizer.decode(g["ids"][row])
        assert prompt.endswith(
            f"user\n{int(5 + 5 * numpy.float32(before))} 0<|im_end|>\n<|im_start|>assistant\n{action}"
        ), prompt
        assert g["rewards"][t, e].item() == pytest.approx(reward)
        assert logp[row].item() == pytest.approx(probs[row, actions[action]].log().item(), abs=1e-4)

    assert g["old_values"].std() > 1e-3
    advantages = {}
    values = dict(zip(moves, g["old_values"].squeeze(1).tolist()))
    for t, e in moves:  # 1506.02438, eq. 16, for each episode alone
        r = [0.02 * move[2] for move in batch[e].moves]
        if not over[e]:  # cut off: what is still to come is what the critic says
            r[-1] = values[lengths[e] - 1, e]
        deltas = [r[k] + 0.98 * values.get((k + 1, e), 0.0) - values[k, e] for k in range(lengths[e])]
        advantages[t, e] = sum((0.98 * 0.95) ** (k - t) * deltas[k] for k in range(t, lengths[e]))
    by_hand = torch.tensor([advantages[move] for move in moves])
    assert g["returns"].squeeze(1).tolist() == pytest.approx(
        [advantages[m] + values[m] for m in moves], abs=1e-5
    )
    normalized = (by_hand - by_hand.mean()) / (by_hand.std() + 1e-4)
    assert g["advantages"].squeeze(1).tolist() == pytest.approx(normalized.tolist(), abs=1e-4)

    record, evals = g["history"][1], [json.loads(line) for line in log.read_text().splitlines()]
    assert len({env.seed for env in batch}) == 6, "other starts for each episode"
    assert [env.seed for env in first] == [env.seed for env in last] == list(range(20)), (
        "the same before and after"
    )
    returns = [sum(move[2] for move in env.moves) for env in batch]
    assert record["return"] == pytest.approx(sum(returns) / 6)
    assert record["entropy"] == pytest.approx(-logp.mean().item(), rel=1e-4)
    for envs, line in ((first, evals[0]), (last, evals[-1])):
        assert len(envs) == 20 and max(len(env.moves) for env in envs) == LIMIT, "not cut off at --max-moves"
        wanted = {
            "n": 20,
            "return": sum(sum(move[2] for move in env.moves) for env in envs) / 20,
            "moves": sum(len(env.moves) for env in envs) / 20,
        }
        assert line["eval"] == pytest.approx(wanted)


def test_it_does_not_depend_on_the_micro_batch(made, main, updates, tmp_path):
    found = []
    for size in (64, 5):
        updates.clear()
        made.clear()
        flags = FLAGS.replace("--steps 2", "--steps 1").replace(
            "--update-epochs 1", "--update-epochs 2 --epsilon 0.001"
        )
        g = main(f"{patched('gymnasium_ppo', tmp_path)} {flags} --micro-batch-size {size}")
        metrics = {name: value for name, value in g["history"][0].items() if name != "seconds"}
        found.append((metrics, list(updates)))
    (whole, wanted), (parts, gradients) = found
    assert len(g["ids"]) > 5 and 0 < whole["clip_frac"] < 1 and whole["value_loss"] > 0
    assert parts == pytest.approx(whole, rel=2e-3, abs=1e-5) and len(gradients) == 4  # policy, critic, twice
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert theirs.norm() > 1e-3 and (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_describe(made, variant):
    """Ten equal parts of -scale to scale; what lies outside counts to the outermost."""
    describe = variant("gymnasium_ppo").describe
    assert (
        describe(numpy.array([-1.0, -0.81, -0.79, -0.01, 0.0, 0.19, 0.99, 1.0, 7.0, -7.0]), 1.0)
        == "0 0 1 4 5 5 9 9 9 0"
    )
    assert describe(numpy.array([1.3, 1.3, -0.13, -0.13]), (2.4, 2.0, 0.2, 2.0)) == "7 8 1 4"

"""The tic-tac-toe variant: catches a rule that is not the game's, an illegal move, a move that is scored under another distribution than it was
drawn from, a side that is credited with the other's result, and a random move that is trained on.
"""

import functools
import json
import random

import pytest
import torch
from conftest import patched

FLAGS = "--steps 2 --batch-size 6 --seed 1 --explore 0.3 --entropy-coef 0.2"


@pytest.fixture
def game(variant):
    return variant("tic_tac_toe")


@pytest.fixture
def ready(game, tiny, monkeypatch):
    """The module with what its main part would set, MOVE_IDS; and the model, the tokenizer."""
    model, tokenizer = tiny("qwen")
    monkeypatch.setattr(game, "MOVE_IDS", tokenizer.convert_tokens_to_ids(list("123456789")), raising=False)
    return game, model, tokenizer


def test_rules(game):
    """Of the 255,168 games that are possible, X wins 131,184, O 77,904, and 46,080 are drawn."""

    @functools.cache
    def count(board, side):
        over = game.result(board)
        if over is not None:
            return {1: (1, 0, 0), -1: (0, 1, 0), 0: (0, 0, 1)}[over]
        other = "O" if side == "X" else "X"
        return tuple(
            map(sum, zip(*(count(board.replace(move, side), other) for move in game.legal_moves(board))))
        )

    assert count(game.START, "X") == (131184, 77904, 46080)


def test_perfect_player(game):
    """It never loses; against itself it draws. The corner is answered by the centre alone."""
    random.seed(0)
    perfect, chance = game.perfect_player, game.random_player
    assert set(game.play({"X": perfect, "O": perfect}, 50)[0]) == {0}
    assert set(game.play({"X": perfect, "O": chance}, 200)[0]) == {0, 1}
    assert set(game.play({"X": chance, "O": perfect}, 200)[0]) == {0, -1}
    assert game.best_moves("X23456789", "O") == (0, ["5"])
    assert game.best_moves("XX3OO6789", "X") == (1, ["3"])


def test_chance_is_as_theory_has_it(game):
    """Two random players: X wins 0.585, O 0.288 of the games (a sum over all of them, each with its probability)."""
    random.seed(0)
    results, _ = game.play({"X": game.random_player, "O": game.random_player}, 4000)
    assert abs(results.count(1) / 4000 - 0.585) < 0.03 and abs(results.count(-1) / 4000 - 0.288) < 0.03


@pytest.mark.parametrize("explore", [0.0, 0.4, 1.0])
def test_play(game, explore):
    """Each move is made on the board that the moves before it left, by the side whose turn it is; random ones are not returned."""
    random.seed(0)

    def lowest(boards, side):
        return [game.legal_moves(board)[0] for board in boards]

    results, moves = game.play({"X": lowest, "O": lowest}, 30, explore)
    assert len(results) == 30 and all(result in (1, 0, -1) for result in results)
    assert not moves if explore == 1 else len(moves) > 30
    for i, (n, board, side, move) in enumerate(moves):
        assert side == ("X" if board.count("X") == board.count("O") else "O")
        assert move == game.legal_moves(board)[0] and game.result(board) is None
        later = [other for other in moves[i + 1 :] if other[0] == n]
        assert all(other[1][int(move) - 1] == side for other in later), "made on the board"
    if explore == 0:  # 1 2 3 ... is won by X with 3, 5, 7
        assert set(results) == {1} and [move[3] for move in moves if move[0] == 0] == list("1234567")


def test_describe(game):
    board = "X2O45X789"
    assert game.describe(board, "X") == "1 0 2 0 0 1 0 0 0"
    assert game.describe(board, "O") == "2 0 1 0 0 2 0 0 0"


def test_illegal_moves_have_no_probability(ready):
    """Alone, without padding, by a softmax over the nine digits' logits that leaves out the squares that are taken."""
    game, model, tokenizer = ready
    boards, sides = ["123456789", "X2O45X789", "XOXXOO78X"], "XOO"
    texts = [game.describe(*of) for of in zip(boards, sides)]
    ids, attn = game.encode_prompts(tokenizer, texts)
    ids = torch.cat([torch.full((3, 2), tokenizer.pad_token_id), ids], 1)  # more padding than there is
    attn = torch.cat([torch.zeros(3, 2, dtype=attn.dtype), attn], 1)
    with torch.no_grad():
        logp = game.move_logp(model, ids, attn, game.legal_mask(boards))
    for row, board in enumerate(boards):
        with torch.no_grad():
            logits = model(ids[row : row + 1, 2:]).logits[0, -1].double()
        free = [i for i, square in enumerate(board) if square not in "XO"]
        weights = {i: logits[tokenizer.convert_tokens_to_ids(str(i + 1))].exp().item() for i in free}
        for i in range(9):
            wanted = weights.get(i, 0.0) / sum(weights.values())
            assert logp[row, i].exp().item() == pytest.approx(wanted, abs=1e-5)


def test_a_step(main, updates, monkeypatch, tmp_path):
    """What is drawn is what is scored; advantages, entropy and gradient against sums of one move after another."""
    drawn, multinomial = [], torch.multinomial

    def watched(probs, n):
        drawn.append(probs)
        return multinomial(probs, n)

    monkeypatch.setattr(torch, "multinomial", watched)
    log = tmp_path / "log"
    g = main(f"{patched('tic_tac_toe', tmp_path)} {FLAGS} --steps 1 --lr 0 --log {log}")
    model, tokenizer, moves, results = g["model"], g["tokenizer"], g["moves"], g["results"]
    assert len({result for result in results}) > 1 and len(moves) < sum(map(len, drawn)), "some were random"

    rewards = [{"X": 1, "O": -1}[side] * results[n] for n, _, side, _ in moves]
    mean = {}
    for side in "XO":
        of_side = [reward for reward, move in zip(rewards, moves) if move[2] == side]
        mean[side] = sum(of_side) / len(of_side)
    assert abs(mean["X"] - mean["O"]) > 0.1
    total, entropies, rows = 0.0, 0.0, torch.cat(drawn)
    for (_, board, side, move), reward in zip(moves, rewards):
        ids, _ = g["encode_prompts"](tokenizer, [g["describe"](board, side)])
        free = [square for square in board if square not in "XO"]
        logits = model(ids).logits[0, -1][tokenizer.convert_tokens_to_ids(free)]
        probs = torch.softmax(logits, 0)
        seen = torch.zeros(9)
        seen[[int(square) - 1 for square in free]] = probs.detach()
        assert (rows - seen).abs().amax(1).min() < 1e-4, "drawn from what the loss takes"
        entropy = -(probs * probs.log()).sum()
        total = total - (reward - mean[side]) * probs[free.index(move)].log() - 0.2 * entropy
        entropies += entropy.item()
    model.zero_grad()
    (total / len(moves)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    record = g["history"][0]
    assert record["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-3)
    ours = updates[0] * record["grad_norm"]
    assert (ours - gradient).norm() < 1e-3 * gradient.norm() and gradient.norm() > 1
    assert record["entropy"] == pytest.approx(entropies / len(moves), rel=1e-4)
    assert (record["x_won"], record["o_won"]) == (results.count(1) / 6, results.count(-1) / 6)
    assert record["moves"] == len(moves) / 6
    evals = [json.loads(line)["eval"] for line in log.read_text().splitlines() if "eval" in line]
    assert len(evals) == 2 and evals[0]["n"] == 200 and 0.3 < evals[0]["lost"] < 0.9, "untrained"


def test_it_does_not_depend_on_the_micro_batch(main, updates, tmp_path):
    found = []
    for size in (256, 5):
        updates.clear()
        g = main(f"{patched('tic_tac_toe', tmp_path)} {FLAGS} --steps 1 --micro-batch-size {size}")
        found.append(({k: v for k, v in g["history"][0].items() if k != "seconds"}, updates[0]))
    (whole, wanted), (parts, gradient) = found
    assert len(g["moves"]) > 5 and parts == pytest.approx(whole, rel=1e-3)
    assert (gradient - wanted).norm() < 1e-3 * wanted.norm()


def test_evaluate(ready, monkeypatch, tmp_path):
    """A perfect policy loses nothing and does not lose to a perfect player; one that takes the highest free square loses."""
    game, model, tokenizer = ready
    random.seed(0)

    def shares(policy):
        def sample(model, tokenizer, boards, side, greedy=False):
            assert greedy
            return policy(boards, side)

        monkeypatch.setattr(game, "sample", sample)
        with open(tmp_path / "log", "w", buffering=1) as log:
            game.evaluate(model, tokenizer, None, log, 0)
        return json.loads((tmp_path / "log").read_text())["eval"]

    best = shares(game.perfect_player)
    assert (best["lost"], best["perfect_lost_as_X"], best["perfect_lost_as_O"]) == (0, 0, 0)
    poor = shares(lambda boards, side: [game.legal_moves(board)[-1] for board in boards])
    assert poor["lost"] == pytest.approx((poor["lost_as_X"] + poor["lost_as_O"]) / 2)
    assert poor["lost_as_X"] < poor["lost_as_O"] and poor["perfect_lost_as_O"] == 1


def test_what_the_model_draws_is_legal(ready):
    game, model, tokenizer = ready
    torch.manual_seed(0)

    def policy(boards, side):
        return game.sample(model, tokenizer, boards, side)

    _, moves = game.play({"X": policy, "O": policy}, 20)
    assert all(move in game.legal_moves(board) for _, board, _, move in moves)
    firsts = [move for _, board, _, move in moves if board == game.START]
    assert len(firsts) == 20 and len({move for _, _, _, move in moves}) > 3
    greedy = [game.sample(model, tokenizer, [game.START], "X", greedy=True) for _ in range(3)]
    assert greedy[0] == greedy[1] == greedy[2]

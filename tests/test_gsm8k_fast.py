"""tests/real/gsm8k_fast.py against gsm8k_sft_grpo.py in float32: the logs it made are worth what this agreement is worth.

Catches a completion that sees another one, a wrong position after a prompt or a dropped row, a gradient that lacks the KL penalty
or the clip, an embedding that is trained as input only, draws from another distribution, and weights that are saved in another order.
"""

import copy
import importlib.util
import json

import gsm8k_sft_grpo as script
import pytest
import torch
from conftest import ROOT

spec = importlib.util.spec_from_file_location("gsm8k_fast", ROOT / "tests/real/gsm8k_fast.py")
fast = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fast)

TINY = str(ROOT / "tests/tiny-qwen")
DATA = str(ROOT / "tests/tiny-gsm8k")


@pytest.fixture(scope="module")
def both(tiny):
    """The fast model, the script's model and tokenizer, four problems, and the tokens to stop at."""
    model, tokenizer = tiny("qwen")
    problems = script.load_gsm8k(DATA, "train")[:4]
    stops = torch.tensor([tokenizer.convert_tokens_to_ids(script.end_of_turn(tokenizer))])
    return fast.Qwen2(TINY, torch.float32), model, tokenizer, [prompt for prompt, _ in problems], stops


def encoded(tokenizer, prompts):
    return [script.encode_prompts(tokenizer, [prompt])[0][0] for prompt in prompts]


def test_greedy_completions_are_the_scripts(both):
    quick, model, tokenizer, prompts, stops = both
    texts, *_, finished = script.sample(model, tokenizer, prompts, 60, greedy=True)
    ids, done, _ = quick.sample(encoded(tokenizer, prompts), 1, 60, stops, greedy=True)
    assert [tokenizer.decode(row[:-1] if end else row) for row, end in zip(ids, done)] == texts
    assert done.tolist() == finished.tolist()


def test_log_probs_when_drawn_are_those_in_the_loss(both):
    quick, model, tokenizer, prompts, stops = both
    torch.manual_seed(0)
    ids, finished, logps = quick.sample(encoded(tokenizer, prompts), 8, 30, stops)
    lengths = [len(row) for row in ids]
    assert len(ids) == 32 and 0 < finished.sum() < 32 and len(set(lengths)) > 4  # some rows leave early
    groups = [(p, ids[8 * i : 8 * i + 8]) for i, p in enumerate(encoded(tokenizer, prompts))]
    scored = quick.score_tokens(quick.work, groups).split(lengths)
    torch.testing.assert_close(torch.stack([s.sum() for s in scored]), logps, rtol=0, atol=2e-4)
    for prompt, rows, own in zip(prompts, range(0, 32, 8), range(0, 32, 8)):
        for row in range(rows, own + 8):
            prompt_ids = script.encode_prompts(tokenizer, [prompt])[0]
            whole = torch.cat([prompt_ids, ids[row][None]], 1)
            mask = torch.ones(1, lengths[row])
            expected = script.completion_logp(model, whole, torch.ones_like(whole), mask)[0]
            torch.testing.assert_close(scored[row], expected.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_gradient_is_the_scripts(both, beta):
    quick, model, tokenizer, prompts, stops = both
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    ids, _, _ = quick.sample(encoded(tokenizer, prompts), 3, 25, stops)
    advantages = torch.randn(12)
    lengths = torch.tensor([len(row) for row in ids])
    noise = [torch.randn(n) * 0.3 for n in lengths]  # so that some tokens are clipped
    loss = 0
    old_logps, ref_logps = [], []
    for row, completion in enumerate(ids):
        whole = torch.cat([script.encode_prompts(tokenizer, [prompts[row // 3]])[0], completion[None]], 1)
        logp = script.completion_logp(model, whole, torch.ones_like(whole), torch.ones(1, len(completion)))
        old_logps.append(logp.detach() + noise[row])
        ref_logps.append(logp.detach() - noise[row])
        terms = old_logps[-1], ref_logps[-1], advantages[row].view(1, 1), 0.2, beta
        loss = loss + script.grpo_loss(logp, *terms)[0].sum() / lengths.sum()
    loss.backward()
    expected = fast.fuse({name: p.grad for name, p in model.named_parameters()}, quick.layers)

    groups = [(p, ids[3 * i : 3 * i + 3]) for i, p in enumerate(encoded(tokenizer, prompts))]
    old_logp, ref_logp = (torch.cat([row[0] for row in rows]) for rows in (old_logps, ref_logps))
    flat = advantages.repeat_interleave(lengths)
    for weight in quick.master.values():
        weight.grad.zero_()
    quick.backward(groups, fast.grpo_derivative(flat, old_logp, ref_logp, 0.2, beta, lengths.sum()), room=150)
    for name, weight in quick.master.items():
        error = (weight.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, name
        weight.grad.zero_()


def test_draws_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.randn(1, 300) * 2  # 300 is no multiple of the blocks' 128
    tokens, logps = fast.draw(logits.expand(20_000, -1))
    expected = logits[0].softmax(0)
    torch.testing.assert_close(logps, expected.log()[tokens], rtol=0, atol=1e-4)
    counts = torch.bincount(tokens, minlength=300)
    assert len(counts) == 300
    common = expected * 20_000 > 5
    chi2 = ((counts - expected * 20_000) ** 2 / (expected * 20_000))[common].sum()
    freedom = int(common.sum()) - 1
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


def test_fused_weights_split_again(both):
    quick, model, *_ = both
    state = fast.split(quick.master, quick.layers, quick.heads, quick.kv, quick.size)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


def test_a_run(tmp_path, capsys):
    flags = "--dtype float32 --sft-steps 2 --steps 3 --batch-size 4 --group-size 8 --max-new-tokens 60"
    flags += " --eval-size 8 --eval-sampled 4 --sft-batch-size 2 --update-epochs 2 --beta 0.04"
    folder = tmp_path / "model"
    fast.main(fast.parse([TINY, DATA, *flags.split(), f"--log={tmp_path / 'log'}", f"--save={folder}"]))
    records = [json.loads(line) for line in open(tmp_path / "log")]
    phases = [(record["phase"], record["step"]) for record in records]
    assert phases == [
        *[("base", 0)] * 2,
        *[("sft", 0), ("sft", 1)],
        *[("sft", 2)] * 2,
        *[("grpo", 2), ("grpo", 3), ("grpo", 4)],
        *[("grpo", 5)] * 2,
    ]
    assert len(records[6]["samples"]) == 32 and 0 < records[8]["kl"] < 1
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    moved = [(p - q).abs().max().item() for p, q in zip(saved.parameters(), start.parameters())]
    assert 0 < max(moved) < 1e-3

"""tests/real/gsm8k_fast.py against gsm8k_sft_grpo.py in float32: the logs it made are worth what this agreement is worth.

Catches a completion that sees another one, a wrong position after a prompt or a dropped row, a gradient that lacks the KL penalty
or the clip, an embedding that is trained as input only, draws from another distribution, weights that are saved in another order, and
a loop whose problems, learning rate, advantages, old log-probs, reference or count of tokens are not the script's.
"""

import copy
import importlib.util
import json
from pathlib import Path

import gsm8k_sft_grpo as script
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from transformers import AutoModelForCausalLM, DynamicCache

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
    for row in range(32):
        prompt_ids = script.encode_prompts(tokenizer, [prompts[row // 8]])[0]
        whole = torch.cat([prompt_ids, ids[row][None]], 1)
        mask = torch.ones(1, lengths[row])
        expected = script.completion_logp(model, whole, torch.ones_like(whole), mask)[0]
        torch.testing.assert_close(scored[row], expected.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_gradient_is_the_scripts(both, beta, monkeypatch):
    monkeypatch.setattr(fast, "PIECE", 50)  # several pieces a batch
    quick, model, tokenizer, prompts, stops = both
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    ids, _, _ = quick.sample(encoded(tokenizer, prompts), 3, 25, stops)
    ids[1] = ids[1][:1]  # a completion of one token, as one that ends at once
    ids[3:6] = [row[:1] for row in ids[3:6]]
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


def train_both(script_main, monkeypatch, folder, flags, more):
    """The script, then its copy on the completions that the script drew: the logs, and how far each moved all weights."""
    draws, draw = [], torch.multinomial

    def started(cache, start=DynamicCache.__init__, **options):
        draws.append([])  # a batch
        start(cache, **options)

    def watched(probs, count):
        draws[-1].append(draw(probs, count))
        return draws[-1][-1]

    with monkeypatch.context() as watch:
        watch.setattr(DynamicCache, "__init__", started)
        watch.setattr(torch, "multinomial", watched)
        paths = f"--model {TINY} --dataset {DATA} --log {folder / 'script.jsonl'} --save {folder / 'script'}"
        script_main(f"gsm8k_sft_grpo.py {paths} --eval-size 0 {flags}")

    def replay(model, prompts, copies, limit, stops, greedy=False):
        eos = json.loads(Path(TINY, "generation_config.json").read_text())["eos_token_id"]
        assert set(eos) <= set(stops.tolist())
        rows = torch.cat(draws.pop(0), 1)
        assert (len(rows), rows.shape[1] <= limit) == (len(prompts) * copies, True)
        ends = [torch.isin(row, stops).nonzero()[:1, 0].tolist() for row in rows]
        ids = [row[: end[0] + 1] if end else row for row, end in zip(rows, ends)]
        return ids, torch.tensor([bool(end) for end in ends]), torch.zeros(len(rows))

    monkeypatch.setattr(fast.Qwen2, "sample", replay)
    paths = [TINY, DATA, f"--log={folder / 'fast.jsonl'}", f"--save={folder / 'fast'}"]
    fast.main(fast.parse([*paths, *"--dtype float32 --eval-size 0".split(), *flags.split(), *more.split()]))
    assert not draws
    logs = [[json.loads(row) for row in open(folder / f"{name}.jsonl")] for name in ("script", "fast")]
    start, *ends = (
        torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(path).parameters()]).detach()
        for path in (TINY, folder / "script", folder / "fast")
    )
    return logs, [end - start for end in ends]


@pytest.mark.parametrize(
    "flags, more",
    [
        ("--sft-steps 4 --steps 0 --batch-size 3", "--sft-batch-size 3"),
        ("--sft-steps 0 --steps 8 --beta 0 --update-epochs 1 --batch-size 1 --group-size 3", "--kl-rows 0"),
        (
            "--sft-steps 1 --steps 4 --beta 0.3 --update-epochs 3 --epsilon 0.01 --batch-size 2 --group-size 3",
            "--sft-batch-size 2 --kl-rows 6",
        ),
    ],
    ids=["sft", "grpo", "both"],
)
def test_training_is_the_scripts(main, monkeypatch, tmp_path, flags, more):
    flags += " --sft-lr 5e-6 --lr 5e-6 --max-new-tokens 40"
    (wanted, got), (moved, copied) = train_both(main, monkeypatch, tmp_path, flags, more)
    assert [record["phase"] for record in got] == [record["phase"] for record in wanted]
    for old, new in zip(wanted, got):
        for name in ("step", "loss", "reward", "grad_norm", "kl", "zero_std", "tokens", "finished"):
            if name in old and name in new:
                assert new[name] == pytest.approx(old[name], rel=2e-3, abs=1e-6), name
        assert [s["text"] for s in new.get("samples", [])] == [s["text"] for s in old.get("samples", [])]
    if "--beta 0 " in flags:  # Adam goes on after a batch that has no gradient
        empty = [record["zero_std"] == 1 for record in got]
        assert (False, True) in zip(empty, empty[1:])
    assert (copied - moved).norm() < 0.002 * moved.norm()
    if "--sft-steps 0" not in flags:  # the model after SFT is saved too
        sft, last = (tmp_path / f"{name}/model.safetensors" for name in ("fast-sft", "fast"))
        assert sft.is_file() and (sft.read_bytes() == last.read_bytes()) == ("--steps 0" in flags)


def test_bfloat16(both, tmp_path):
    """Packed weights are the weights, before and after an update; its gradient is near that of float32."""
    exact, _, tokenizer, prompts, stops = both
    quick = fast.Qwen2(TINY, torch.bfloat16)
    groups = encoded(tokenizer, prompts)
    ids = exact.sample(groups, 2, 30, stops)[0]
    groups = [(prompt, ids[2 * i : 2 * i + 2]) for i, prompt in enumerate(groups)]
    for model in (exact, quick):
        for weight in model.master.values():
            weight.grad.zero_()
        model.backward(groups, lambda logp, _: torch.full_like(logp, -1 / 100))
    for name, weight in quick.master.items():
        cosine = F.cosine_similarity(weight.grad.flatten(), exact.master[name].grad.flatten(), 0)
        assert cosine > 0.99, (name, cosine)
    for _ in range(2):
        for name, weight in quick.work.items():
            if weight.dim() == 2:
                x = torch.randn(5, weight.shape[1]).bfloat16()
                expected = x.float() @ quick.master[name].bfloat16().float().T
                error = (quick.linear(x, name).float() - expected).norm() / expected.norm()
                assert error < 0.01, (name, error)  # bfloat16 has eight bits
        for weight in quick.master.values():
            weight.data.neg_()
        quick.renew()


def test_a_run(tmp_path, capsys):
    """With its own sampling: its evaluations, and samples whose log-probs at the start are the reference's."""
    flags = "--dtype float32 --sft-steps 2 --steps 3 --batch-size 4 --group-size 8 --max-new-tokens 60 --eval-every 2"
    flags += " --eval-size 8 --eval-sampled 4 --sft-batch-size 2"
    folder = tmp_path / "model"
    fast.main(fast.parse([TINY, DATA, *flags.split(), f"--log={tmp_path / 'log'}", f"--save={folder}"]))
    records = [json.loads(line) for line in open(tmp_path / "log")]
    phases = [(record["phase"], record["step"]) for record in records]
    assert phases == [
        *[("base", 0)] * 2,
        *[("sft", 0), ("sft", 1)],
        *[("sft", 2)] * 2,
        *[("grpo", 2), ("grpo", 3)],
        *[("grpo", 4)] * 2,
        ("grpo", 4),
        *[("grpo", 5)] * 2,
    ]
    tests = [record for record in records if "eval" in record]
    assert all(sum(record["right"]) == record["eval"]["reward"] * len(record["right"]) for record in tests)
    assert any(record["eval"]["lenient"] > record["eval"]["reward"] > 0 for record in tests)
    grpo = [record for record in records if "samples" in record]
    assert len(grpo[0]["samples"]) == 32 and abs(grpo[0]["kl"]) < 1e-6 < grpo[2]["kl"] < 1
    assert 0 < grpo[0]["entropy"] < 2
    AutoModelForCausalLM.from_pretrained(folder)

"""GSM8K's score, data and micro-batches: catches a right answer scored 0 and a wrong one scored 1, a gradient that depends on how the
batch is cut, a reference from before SFT, and calculator annotations in the targets.
"""

import json
import random
import signal

import gsm8k_grpo
import gsm8k_sft_grpo
import pytest
import torch
from conftest import ROOT
from gsm8k_grpo import load_gsm8k, numbers, score
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

REAL = ROOT.parent / "shared" / "gsm8k"
QUICK = "--batch-size 2 --group-size 4 --max-new-tokens 64 --eval-size 4"
BOTH = pytest.mark.parametrize("script", ["gsm8k_grpo", "gsm8k_sft_grpo"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        ("none", []),
        ("18", [18]),
        ("18.", [18]),
        ("18.00", [18]),
        (".5 and 0.5", [0.5, 0.5]),
        ("$18", [18]),
        ("-$1,234.50", [-1234.5]),
        ("$-5", [-5]),
        ("1,000,000", [1000000]),
        ("1,8", [1, 8]),
        ("1,0000", [1, 0]),
        ("3, 4", [3, 4]),
        (".0.30", [0]),
        ("1.2.3", [1.2]),
        ("20-5", [20, 5]),
        ("20 -5", [20, -5]),
        ("3/4", [3, 4]),
        ("10^3", [10, 3]),
        ("2*9=18", [2, 9, 18]),
        ("50%", [50]),
        ("x18y", [18]),
        ("$5$$6$", [5, 6]),
        ("--5", [-5]),
        ("-$-5", [-5]),
        ("x = ---18.5", [-18.5]),
    ],
)
def test_numbers(text, expected):
    assert numbers(text) == expected


GOLD = "She has 20 - 2 = <<20-2=18>>18 eggs.\n#### 18"


@pytest.mark.parametrize(
    "completion, strict, lenient",
    [
        ("", 0, 0),
        ("####", 0, 0),
        ("#### ", 0, 0),
        ("18", 0, 1),
        ("The answer is 18.", 0, 1),
        ("**18**", 0, 1),
        ("\\boxed{18}", 0, 1),
        ("#### 18", 1, 1),
        ("####18", 1, 1),
        ("####\n18", 1, 1),
        ("so 20 - 2 = 18\n#### 18\n", 1, 1),
        ("#### 18.", 1, 1),
        ("#### 18.0", 1, 1),
        ("#### $18", 1, 1),
        ("#### $18.00", 1, 1),
        ("#### 018", 1, 1),
        ("#### 18 eggs", 1, 1),
        ("#### **18**", 1, 1),
        ("#### <number>18", 1, 1),
        ("#### 18\nThat was problem 4.", 1, 0),
        ("#### 17\n#### 18", 1, 1),
        ("#### 18\n#### 17", 0, 0),
        ("#### 18 ####", 0, 1),
        ("### 18", 0, 1),
        ("##### 18", 1, 1),
        ("#### 17", 0, 0),
        ("#### -18", 0, 0),
        ("#### 118", 0, 0),
        ("#### 180", 0, 0),
        ("#### 18.5", 0, 0),
        ("#### 1.8", 0, 0),
        ("#### 1,8", 0, 0),
        ("#### 18,000", 0, 0),
        ("#### 18 or 19", 0, 0),
        ("#### 17 or 18", 0, 1),
        ("#### 20 - 2", 0, 0),
        ("#### 20 - 2 = 18", 0, 1),
        ("#### 18/1", 0, 0),
        ("#### eighteen", 0, 0),
        ("18\n#### none", 0, 1),
    ],
)
def test_reward_as_a_person_would(completion, strict, lenient):
    assert score(completion, GOLD) == {"reward": strict, "lenient": lenient}


def test_the_answer_may_be_negative_or_large():
    right, wrong = {"reward": 1, "lenient": 1}, {"reward": 0, "lenient": 0}
    assert score("#### -7", "#### -7") == right and score("#### 7", "#### -7") == wrong
    assert score("#### 1,234", "#### 1234") == score("#### 1234", "#### 1,234") == right
    assert score("#### 192000000", "#### 192,000,000") == right


def test_a_solution_without_a_number_is_an_error():
    """Or a completion without a number would match it."""
    with pytest.raises(IndexError):
        score("#### none", "no number at all")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real GSM8K is not part of the project")
@pytest.mark.parametrize("split, count", [("train", 7473), ("test", 1319)])
def test_every_real_solution_is_right(split, count):
    rows = [json.loads(line) for line in open(REAL / f"{split}.jsonl")]
    loaded = load_gsm8k(str(REAL), split)
    assert len(rows) == len(loaded) == count
    for row, (problem, solution) in zip(rows, loaded):
        gold = row["answer"].split("#### ")[1]
        assert numbers(gold) == [int(gold.replace(",", ""))]
        assert (
            score(row["answer"], row["answer"])
            == score(solution, row["answer"])
            == {"reward": 1, "lenient": 1}
        )
        assert problem == row["question"] and "<<" not in solution and ">>" not in solution


@pytest.mark.skipif(not REAL.is_dir(), reason="the real GSM8K is not part of the project")
def test_real_problems_run(main):
    g = main(f"gsm8k_grpo.py --dataset {REAL} --steps 1 {QUICK}")
    assert len(g["TRAIN"]) == 7473 and len(g["TEST"]) == 4 and len(g["history"]) == 1


def gradients(g):
    return torch.cat([p.grad.flatten() for p in g["model"].parameters()])


def test_micro_batches_add_up(main):
    one, three, whole = (
        gradients(main(f"gsm8k_grpo.py --steps 1 {QUICK} --micro-batch-size {size}")) for size in (1, 3, 8)
    )
    assert 0.9 < whole.norm() <= 1 + 1e-4
    assert (one - whole).abs().max() < 1e-5 and (three - whole).abs().max() < 1e-5


@BOTH
def test_one_micro_batch_at_a_time(main, script, monkeypatch):
    """Rows x columns of the policy's and the reference's logits: the completions' only, each backward before the next rows."""
    seen, forward = [], Qwen2ForCausalLM.forward

    def watched(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if out.logits.shape[1] > 1:  # else the sampler's
            seen.append(tuple(out.logits.shape[:2]))
        if out.logits.requires_grad:
            out.logits.register_hook(lambda gradient: seen.append("backward"))
        return out

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", watched)
    g = main(f"{script}.py --steps 1 {QUICK} --batch-size 5 --micro-batch-size 3")
    C, expected = g["mask"].shape[1], []
    for passes in (2, 1):  # the reference is asked in the first update only
        for rows in (3, 3, 3, 3, 3, 3, 2):
            expected += [(rows, C)] * passes + ["backward"]
    assert seen[-len(expected) :] == expected
    sft = [3, "backward", 2, "backward"] * 3 if script == "gsm8k_sft_grpo" else []
    assert [x if x == "backward" else x[0] for x in seen[: -len(expected)]] == sft


def test_micro_batches_of_sft_add_up(main, monkeypatch):
    """Each gradient as the clipping sees it; the first is SFT's."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def watched(parameters, *args, **kwargs):
        parameters = list(parameters)
        seen.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    for size in (1, 3, 8):
        main(f"gsm8k_sft_grpo.py --steps 1 --sft-steps 1 {QUICK} --batch-size 5 --micro-batch-size {size}")
    one, three, whole = seen[0], seen[3], seen[6]
    assert (one - whole).norm() < 1e-5 * whole.norm() and (three - whole).norm() < 1e-5 * whole.norm()


def test_grpo_in_the_loop(main, tiny):
    """The last update's gradient against one of our own, from one pass over the whole batch without micro-batches."""
    g = main(f"gsm8k_grpo.py --steps 2 --lr 0 --beta 0.3 {QUICK} --batch-size 5")
    rewards = [score(text, answer)["reward"] for text, answer in zip(g["texts"], g["answers"])]
    assert g["rewards"].tolist() == rewards and g["prompts"][:4] == (g["prompts"][0],) * 4
    logp = g["completion_logp"](g["model"], g["ids"], g["attn"], g["mask"])
    advantages = g["group_advantages"](torch.tensor(rewards), 4)
    loss = -(advantages * torch.exp(logp - logp.detach()) * g["mask"]).sum() / g["mask"].sum()  # lr 0: no KL
    ours = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(g["model"].parameters()))])
    ours *= min(1.0, 1 / ours.double().norm().item())
    assert (ours - gradients(g)).abs().max() < 1e-5
    assert g["history"][-1]["kl"] == pytest.approx(0, abs=1e-6)


@BOTH
def test_a_batch_that_teaches_nothing_is_a_step(main, script):
    g = main(f"{script}.py --steps 2 --batch-size 2 --group-size 2 --max-new-tokens 1 --eval-size 2")
    assert [record["zero_std"] for record in g["history"]] == [1, 1]
    assert [record["reward"] for record in g["history"]] == [0, 0]


def test_share_of_groups_without_variance(main):
    g = main(f"gsm8k_grpo.py --steps 1 --batch-size 6 {QUICK.split(' ', 2)[2]}")
    groups = g["rewards"].view(-1, 4)
    flat = [len(set(group.tolist())) == 1 for group in groups]
    assert 0 < sum(flat) < 6 and g["history"][0]["zero_std"] == pytest.approx(sum(flat) / 6)


def test_evaluation(main, tmp_path, capsys):
    """Counted again here; Wilson's interval by its definition, the roots of (p - x)^2 = 1.96^2 x (1 - x) / n."""
    flags = "--steps 1 --batch-size 1 --group-size 2 --max-new-tokens 96 --eval-size 90"
    g = main(f"gsm8k_grpo.py {flags} --log {tmp_path / 'log'}")
    first = json.loads((tmp_path / "log").read_text().splitlines()[0])["eval"]
    model = g["AutoModelForCausalLM"].from_pretrained(ROOT / "tests/tiny-qwen", dtype=torch.float32)
    texts = []
    for question, _ in g["TEST"]:  # one by one
        texts += g["sample"](model, g["tokenizer"], [question], 96, greedy=True)[0]
    scores = [score(text, solution) for text, (_, solution) in zip(texts, g["TEST"], strict=True)]
    p, lenient = (sum(s[name] for s in scores) / 90 for name in ("reward", "lenient"))
    assert first == {"reward": pytest.approx(p), "lenient": pytest.approx(lenient), "n": 90}
    out = capsys.readouterr().out
    assert f"base model: 90 of 90 problems, greedy: reward {p:.4g}  lenient {lenient:.4g}\n" in out
    low, high = (float(x) for x in out.split("95% interval of the reward: ")[1].split("\n")[0].split(" to "))
    for x in (low, high):
        assert (p - x) ** 2 == pytest.approx(1.96**2 * x * (1 - x) / 90, abs=2e-4)
    assert low < p < high


def test_interval_of_all_and_of_none():
    """Where every answer is right, the interval still has a width: its lower end solves (1 - x)^2 = 1.96^2 x (1 - x) / n."""
    for share, other in ((1.0, 0), (0.0, 1)):
        ends = gsm8k_grpo.wilson_interval(share, 200)
        x = ends[other]
        assert (share - x) ** 2 == pytest.approx(1.96**2 * x * (1 - x) / 200) and abs(share - x) > 0.01


def test_sft_then_grpo(main, tiny, monkeypatch, tmp_path):
    """Targets without the calculator's marks and with an end; the reference is the model after SFT; a fresh optimizer."""
    seen, call = [], PreTrainedTokenizerFast.__call__

    def watched(self, text, **kwargs):
        seen.append(text)
        return call(self, text, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", watched)
    g = main(f"gsm8k_sft_grpo.py --steps 1 --sft-steps 3 {QUICK} --lr 1e-5 --log {tmp_path / 'log'}")
    targets = [
        text
        for batch in seen
        if isinstance(batch, list)
        for text in batch
        if "####" in text and "<|im_start|>" not in text
    ]
    assert len(targets) == 3 * 2
    solutions = {solution for _, solution in g["TRAIN"]}
    for text in targets:
        assert "<<" not in text and ">>" not in text and text.endswith("<|im_end|>")
        assert any(s.split("\n#### ")[1] == text.split("#### ")[1][: -len("<|im_end|>")] for s in solutions)
    fresh, _ = tiny("qwen")
    pairs = list(zip(fresh.parameters(), g["reference"].parameters(), g["model"].parameters(), strict=True))
    assert not any(torch.equal(a, b) or torch.equal(b, c) for a, b, c in pairs)
    # SFT moved each weight by about 3 + 2 + 1 thirds of lr, the two updates of GRPO's only step by 2 lr more
    moved = [
        torch.stack([(x - y).abs().max() for x, y in zip(*two)]).max()
        for two in (zip(*[(a, b) for a, b, _ in pairs]), zip(*[(b, c) for _, b, c in pairs]))
    ]
    assert moved[0] < 3e-5 and moved[1] < 3e-5
    assert g["optimizer"].state[next(g["model"].parameters())]["step"] == 2
    phases = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [x["phase"] for x in phases if "eval" in x] == ["base", "sft", "grpo"]
    assert gsm8k_sft_grpo.SYSTEM == gsm8k_grpo.SYSTEM


def test_ctrl_c_in_the_sft_phase(main, monkeypatch, tmp_path):
    """What has been learned is evaluated under its own name and saved."""
    calls, choices = [], random.choices

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return choices(*args, **kwargs)

    monkeypatch.setattr(random, "choices", interrupted)
    main(f"gsm8k_sft_grpo.py {QUICK} --log {tmp_path / 'log'} --save {tmp_path / 'model'}")
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [record["phase"] for record in log] == ["base", "sft", "sft", "sft"] and log[-1]["eval"]["n"] == 4
    assert (tmp_path / "model" / "model.safetensors").exists()

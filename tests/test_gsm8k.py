"""GSM8K's reward, data, micro-batches and processes: catches a right answer scored 0 and a wrong one scored 1, a gradient that
depends on how the batch is cut or shared out, a reference from before SFT, and calculator marks in the targets.
"""

import json
import os
import random
import subprocess
import sys

import gsm8k_grpo
import gsm8k_sft_grpo
import pytest
import torch
from conftest import ROOT
from gsm8k_grpo import gsm8k_reward, numbers
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
    assert gsm8k_reward(GOLD, completion) == {"accuracy": strict, "lenient": lenient}


def test_the_answer_may_be_negative_or_large():
    right, wrong = {"accuracy": 1, "lenient": 1}, {"accuracy": 0, "lenient": 0}
    assert gsm8k_reward("#### -7", "#### -7") == right and gsm8k_reward("#### -7", "#### 7") == wrong
    assert gsm8k_reward("#### 1234", "#### 1,234") == gsm8k_reward("#### 1,234", "#### 1234") == right
    assert gsm8k_reward("#### 192,000,000", "#### 192000000") == right


@pytest.mark.skipif(not REAL.is_dir(), reason="the real GSM8K is not part of the project")
@pytest.mark.parametrize("split, count", [("train", 7473), ("test", 1319)])
def test_every_real_solution_is_right(split, count):
    rows = [json.loads(line) for line in open(REAL / f"{split}.jsonl")]
    assert len(rows) == count
    for row in rows:
        gold = row["answer"].split("#### ")[1]
        assert numbers(gold) == [int(gold.replace(",", ""))]
        assert gsm8k_reward(row["answer"], row["answer"]) == {"accuracy": 1, "lenient": 1}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real GSM8K is not part of the project")
def test_real_problems_run(main):
    g = main(f"gsm8k_grpo.py --dataset {REAL} --steps 1 {QUICK}")
    assert len(g["train"]) == 7473 and len(g["test"]) == 1319 and len(g["history"]) == 1


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
    rewards = [gsm8k_reward(s, t)["accuracy"] for s, t in zip(g["solutions"], g["texts"])]
    assert g["rewards"].tolist() == rewards and g["questions"][:4] == (g["questions"][0],) * 4
    logp = g["completion_logp"](g["model"], g["ids"], g["attn"], g["mask"])
    advantages = g["group_advantages"](torch.tensor(rewards), 4)
    loss = -(advantages * torch.exp(logp - logp.detach()) * g["mask"]).sum() / g["mask"].sum()  # lr 0: no KL
    ours = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(g["model"].parameters()))])
    ours *= min(1.0, 1 / ours.double().norm().item())
    assert (ours - gradients(g)).abs().max() < 1e-5
    assert g["history"][-1]["kl"] == pytest.approx(0, abs=1e-6)


DRIVER = """
import os, random, runpy, sys, torch
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
draws = torch.rand(300, 8, generator=torch.Generator().manual_seed(5))
state = {"t": 0}

def multinomial(probs, n):  # the same draw for the same place in the group, whatever the batch
    state["t"] += 1
    u = draws[state["t"] % 300, torch.arange(len(probs)) % 4]
    return (probs.cumsum(-1) < u[:, None]).sum(-1, keepdim=True).clamp(max=probs.shape[1] - 1)

calls = {"n": 0}

def choices(rows, k):  # neighbouring problems for the processes, one process has them all
    state["t"], calls["n"] = 0, calls["n"] + 1
    first = calls["n"] * k * world + rank * k
    return rows[first : first + k]

torch.multinomial, random.choices = multinomial, choices
leave, out, sys.argv = os._exit, sys.argv[1], sys.argv[2:]

def finish(g, code):
    with open(f"{out}.{rank}", "w") as seed, open(f"{out}.{rank}.end", "w") as end:
        seed.write(str(torch.initial_seed()))
        end.write(str(code))
    if rank == 0:
        parameters = list(g["model"].parameters())
        torch.save([torch.cat([x.flatten() for x in y]) for y in (parameters, [p.grad for p in parameters])], out)
    leave(0)

os._exit = lambda code: finish(sys._getframe(1).f_globals, code)  # what follows it in the script does not run
g = runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
finish(g, None)
"""


@BOTH
def test_two_processes_are_one(tmp_path, script):
    """Two gloo processes of two prompts each give the gradient and the weights of one with all four."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    results = []
    for processes, size in ((1, 4), (2, 2)):
        out, log = tmp_path / f"{processes}.pt", tmp_path / f"{processes}.jsonl"
        launch = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--"]
            if processes > 1
            else []
        )
        flags = f"--steps 2 --lr 1e-6 --batch-size {size} --group-size 4 --max-new-tokens 48 --eval-size 6 --log {log}"
        flags += f" --save {tmp_path / str(processes)}" + " --sft-steps 1" * (script == "gsm8k_sft_grpo")
        done = subprocess.run(
            [sys.executable, *launch, str(driver), str(out), f"{script}.py", *flags.split()],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        evaluations = [json.loads(line)["eval"] for line in open(log) if "eval" in line]
        assert done.stdout.count("tokens/s, GPU") == 1, "the last line, of the first process alone"
        results.append((*torch.load(out), evaluations, done.stdout.count("\nstep 1 ")))
    (w1, g1, e1, lines1), (w2, g2, e2, lines2) = results
    assert g1.norm() > 0.5 and (g1 - g2).abs().max() < 1e-5 and (w1 - w2).abs().max() < 1e-5
    assert (tmp_path / "2.pt.0").read_text() != (tmp_path / "2.pt.1").read_text(), "each its own seed"
    # Python's own exit aborts one time in twenty under gloo's threads, and torchrun then kills the process that saves
    exits = [(tmp_path / f"{name}.end").read_text() for name in ("1.pt.0", "2.pt.0", "2.pt.1")]
    assert exits == ["None", "0", "0"] and (tmp_path / "2" / "model.safetensors").exists()
    assert e1 == e2 and all(e["n"] == 6 for e in e1) and lines1 == lines2 == 1


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
    """Counted again here; Wilson's interval by the formula of its definition, the roots of (p - x)^2 = 1.96^2 x (1 - x) / n."""
    g = main(
        f"gsm8k_grpo.py --steps 1 --batch-size 1 --group-size 2 --max-new-tokens 96 --eval-size 90 --log {tmp_path / 'log'}"
    )
    first = json.loads((tmp_path / "log").read_text().splitlines()[0])["eval"]
    model = g["AutoModelForCausalLM"].from_pretrained(ROOT / "tests/tiny-qwen", dtype=torch.float32)
    texts = []
    for question, _ in g["test"][:90]:  # one by one
        texts += g["sample"](model, g["tokenizer"], [question], 96, greedy=True)[3]
    scores = [gsm8k_reward(s, text).values() for text, (_, s) in zip(texts, g["test"])]
    p = sum(strict for strict, _ in scores) / 90
    assert first == {
        "accuracy": pytest.approx(p, abs=6e-4),
        "lenient": pytest.approx(sum(lenient for _, lenient in scores) / 90, abs=6e-4),
        "n": 90,
    }
    line = next(line for line in capsys.readouterr().out.splitlines() if "accuracy" in line)
    assert f"accuracy {p:.3f}" in line and "90 of 90" in line
    low, high = (float(part) for part in line.split("(")[1].split(" at")[0].split(" to "))
    for x in (low, high):
        assert (p - x) ** 2 == pytest.approx(1.96**2 * x * (1 - x) / 90, abs=2e-4)
    assert low < p < high


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
    solutions = {solution for _, solution in g["train"]}
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


@BOTH
@pytest.mark.parametrize(
    "rows", ['{"question": "What?"}', '{"frage": "Was?", "answer": "#### 1"}', "no json", None]
)
def test_data_that_cannot_be_had(main, tmp_path, script, rows):
    if rows:
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text(rows + "\n")
    with pytest.raises(SystemExit) as end:
        main(f"{script}.py --dataset {tmp_path}")
    line = end.value.code
    assert f"--dataset {tmp_path}" in line and len(line.splitlines()) == 1


def test_ctrl_c_in_the_sft_phase(main, monkeypatch, tmp_path):
    """What has been learned is evaluated under its own name and saved."""
    calls, choices = [], random.choices

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return choices(*args, **kwargs)

    monkeypatch.setattr(random, "choices", interrupted)
    main(f"gsm8k_sft_grpo.py {QUICK} --log {tmp_path / 'log'} --save {tmp_path / 'model'}")
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [record["phase"] for record in log] == ["base", "sft", "sft", "sft"] and log[-1]["eval"]["n"] == 4
    assert (tmp_path / "model" / "model.safetensors").exists()

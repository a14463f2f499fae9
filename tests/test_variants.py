"""The diffs in tests/variants: each applies to its base, and the patched script does what it claims.

torchrun.diff: catches a gradient that depends on how the batch is shared out, processes that draw the same samples, a process that
stops alone, and a sum over processes that one of them does not join.
"""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

VARIANTS = sorted((ROOT / "tests/variants").glob("*.diff"))


def base_of(diff):
    """The file that a diff changes, by its own first line."""
    (line,) = [line for line in diff.read_text().splitlines() if line.startswith("--- a/")]
    return line.removeprefix("--- a/")


def patched(name, folder):
    """A copy of the base with the diff applied."""
    diff = ROOT / f"tests/variants/{name}.diff"
    path = folder / f"{name}.py"
    path.write_text((ROOT / base_of(diff)).read_text())
    subprocess.run(["patch", "--silent", path, diff], check=True)
    return path


@pytest.mark.parametrize("diff", VARIANTS, ids=lambda diff: diff.stem)
def test_applies_cleanly(diff, tmp_path):
    """With patch and with git apply, to the same result, without an offset or fuzz: a change to the base must reach its variants."""
    path = tmp_path / "patched.py"
    path.write_text((ROOT / base_of(diff)).read_text())
    done = subprocess.run(["patch", "--fuzz=0", path, diff], capture_output=True, text=True)
    assert done.returncode == 0 and "offset" not in done.stdout, f"{diff.stem} does not apply: {done.stdout}"
    (tmp_path / "git").mkdir()
    (tmp_path / "git" / base_of(diff)).write_text((ROOT / base_of(diff)).read_text())
    subprocess.run(["git", "apply", diff], cwd=tmp_path / "git", check=True)
    assert (tmp_path / "git" / base_of(diff)).read_text() == path.read_text()


@pytest.mark.parametrize("diff", VARIANTS, ids=lambda diff: diff.stem)
def test_is_as_tidy_as_its_base(diff, tmp_path):
    path = patched(diff.stem, tmp_path)
    assert max(map(len, path.read_text().splitlines())) <= 110
    compile(path.read_text(), path, "exec")


# Runs a script with sampled tokens and drawn problems that do not depend on how the batch is shared out.
DRIVER = """
import os, random, runpy, signal, sys, torch
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
    if os.environ.get("INTERRUPT") == f"{rank} {calls['n']}":
        signal.raise_signal(signal.SIGINT)
    first = calls["n"] * k * world + rank * k
    return rows[first : first + k]

torch.multinomial, random.choices = multinomial, choices
leave, out, sys.argv = os._exit, sys.argv[1], sys.argv[2:]

load = torch.nn.Module.to
def to(self, *args, **kwargs):  # a parameter that no pass uses, and one that is frozen
    if hasattr(self, "lm_head") and not hasattr(self, "unused"):
        self.unused = torch.nn.Parameter(torch.zeros(3))
        self.model.norm.weight.requires_grad_(False)
    return load(self, *args, **kwargs)
torch.nn.Module.to = to

def finish(g):
    parameters = [p for name, p in g["model"].named_parameters() if p.grad is not None and name != "unused"]
    flat = [torch.cat([x.flatten() for x in y]) for y in (parameters, [p.grad for p in parameters])]
    torch.save(flat + [torch.initial_seed()], f"{out}.{rank}")
    leave(0)

os._exit = lambda code: finish(sys._getframe(1).f_globals)  # the last statement of the variant
g = runpy.run_path(sys.argv[0], run_name="__main__")
assert world == 1, "a process of torchrun must leave by os._exit"
finish(g)
"""


def gsm8k(script, folder, processes, **environment):
    """Runs the script on 4 prompts in all, by as many processes; gives what each leaves behind, the log and the output."""
    (folder / "driver.py").write_text(DRIVER)
    out, log, saved = folder / "out", folder / f"{processes}.jsonl", folder / f"saved-{processes}"
    flags = (
        f"--steps 3 --lr 1e-6 --batch-size {4 // processes} --group-size 4 --max-new-tokens 48 --eval-size 6"
    )
    command = [
        sys.executable,
        folder / "driver.py",
        out,
        script,
        *flags.split(),
        "--log",
        log,
        "--save",
        saved,
    ]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        extra = {
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }
        started.append(
            subprocess.Popen(
                [*map(str, command)],
                cwd=ROOT,
                env=os.environ | environment | (extra if processes > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=300) for process in started]
    for process, (_, stderr) in zip(started, outputs):
        assert process.returncode == 0, stderr[-2000:]
    assert (saved / "model.safetensors").exists()
    left = [torch.load(f"{out}.{rank}") for rank in range(processes)]
    return left, [json.loads(line) for line in log.read_text().splitlines()], [out for out, _ in outputs]


def test_two_processes_are_one(tmp_path):
    """Two gloo processes of two prompts each give the gradient, the weights, the metrics and the samples of one with all four."""
    (one,), log_one, _ = gsm8k("gsm8k_grpo.py", tmp_path, 1)
    two, log_two, (first, second) = gsm8k(patched("torchrun", tmp_path), tmp_path, 2)
    for weights, gradient, _ in two:
        assert one[1].norm() > 0.5 and (gradient - one[1]).abs().max() < 1e-5
        assert (weights - one[0]).abs().max() < 1e-5
    assert two[0][2] != two[1][2], "each process needs a seed of its own"
    assert len(log_one) == len(log_two) == 5 and not second.strip() and first.count("\nstep ") == 3
    for a, b in zip(log_one, log_two):
        samples = a.pop("samples", None), b.pop("samples", None)
        assert samples[0] == samples[1]
        a, b = a.get("eval", a), b.get("eval", b)
        assert {k: v for k, v in a.items() if k != "phase"} == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_in_one_process_stops_all_after_the_same_step(tmp_path, rank):
    path = patched("torchrun", tmp_path)
    left, log, _ = gsm8k(path, tmp_path, 2, INTERRUPT=f"{rank} 2")
    assert torch.equal(left[0][0], left[1][0]), "the models differ"
    assert [record["step"] for record in log] == [0, 0, 1, 2] and "eval" in log[-1]


def test_torchrun_launches_it(tmp_path):
    path = patched("torchrun", tmp_path)
    flags = "--steps 1 --batch-size 1 --group-size 2 --max-new-tokens 8 --eval-size 4".split()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    command = [*launch, str(path), *flags, "--log", str(tmp_path / "log")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "log").read_text().splitlines()) == 3

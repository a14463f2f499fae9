"""Whatever ends training, the model is saved: catches an error, a Ctrl-C or a full disk that costs a run, a bad --save or --log that is
noticed too late, and a script that swallows what ended it.
"""

import errno
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PRESENT, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

RL = [name for name in PRESENT if name not in ("minimal_sft", "minimal_dpo")]
each = pytest.mark.parametrize("script", PRESENT)


def quick(script):
    """Short steps, but with rates that move the weights in each."""
    gsm8k = " --eval-size 2 --group-size 2" if script.startswith("gsm8k") else ""
    return f"{script}.py --steps 4 --batch-size 2 --max-new-tokens 8{gsm8k}"


def in_step(monkeypatch, number, f):
    """Calls f when the batch of that step is drawn, be it of SFT or of RL."""
    choices, calls = random.choices, []

    def watched(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            f()
        return choices(*args, **kwargs)

    monkeypatch.setattr(random, "choices", watched)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def fail():
    raise ZeroDivisionError


@pytest.fixture(autouse=True)
def handler():
    """Python's own during each test, whoever started it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def trained(monkeypatch):
    """The policy's weights after the last optimizer step. The first optimizer to step is the policy's in all files."""
    policy, weights, step = [], [], torch.optim.Adam.step

    def watched(self):
        step(self)
        if not policy:
            policy.extend(self.param_groups[0]["params"])
        weights[:] = [p.detach().clone() for p in policy]

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    return weights


def saved(folder, weights):
    """The folder loads, and has just these weights."""
    AutoTokenizer.from_pretrained(folder)
    stored = list(AutoModelForCausalLM.from_pretrained(folder).parameters())
    return len(stored) == len(weights) and all(map(torch.equal, stored, weights))


@each
@pytest.mark.parametrize("f, error", [(ctrl_c, KeyboardInterrupt), (fail, ZeroDivisionError)])
def test_ctrl_c_and_an_error(main, tmp_path, monkeypatch, trained, script, f, error):
    """In the third step: two are in the log and in the model, and the error comes out as it is."""
    in_step(monkeypatch, 3, f)
    with pytest.raises(error):
        main(f"{quick(script)} --save {tmp_path / 'model'} --log {tmp_path / 'log'}")
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [r["step"] for r in log if "eval" not in r] == [0, 1]
    assert saved(tmp_path / "model", trained)


@pytest.mark.parametrize("script", RL)
def test_a_score_that_raises(main, tmp_path, script):
    """In the third step, on a text that nobody thought of."""
    source = (ROOT / f"{script}.py").read_text()
    old = "    scores = [score(text, answer) for text, answer in zip(texts, answers)]\n"
    assert source.count(old) == 1
    (tmp_path / "changed.py").write_text(source.replace(old, "    1 / (2 - step)\n        " + old))
    flags = " ".join(quick(script).split()[1:])
    with pytest.raises(ZeroDivisionError):
        main(f"{tmp_path / 'changed.py'} {flags} --save {tmp_path / 'model'}")
    assert (tmp_path / "model" / "model.safetensors").exists()


@each
def test_a_gradient_that_is_not_finite(main, tmp_path, monkeypatch, script):
    """At the seventh clipping, after some updates: what is saved are the sound weights of before."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def watched(parameters, *args, **kwargs):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 7:
            parameters[0].grad[0, 0] = float("nan")
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    with pytest.raises(RuntimeError, match="non-finite"):
        main(f"{quick(script).replace('--steps 4', '--steps 8')} --save {tmp_path / 'model'}")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "model").parameters()
    assert len(calls) == 7 and all(torch.isfinite(p).all() for p in stored)


@each
def test_a_full_disk_under_the_log(main, tmp_path, monkeypatch, script):
    """The log's disk, not that of --save: the second step's line cannot be written."""
    dump, calls = json.dumps, []

    def watched(*args, **kwargs):
        if "step" in args[0] and "eval" not in args[0]:
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return dump(*args, **kwargs)

    monkeypatch.setattr(json, "dumps", watched)
    with pytest.raises(OSError, match="No space left"):
        main(f"{quick(script)} --save {tmp_path / 'model'}")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@each
def test_the_tokenizer_is_saved_before_training(main, tmp_path, monkeypatch, script):
    """So that a folder that cannot be written ends the run at once, and an old log survives that."""
    (tmp_path / "log").write_text("precious")

    def refuse(self, folder, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", folder)

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", refuse)
    with pytest.raises(PermissionError, match="model"):
        main(f"{quick(script)} --save {tmp_path / 'model'} --log {tmp_path / 'log'}")
    assert (tmp_path / "log").read_text() == "precious"


def test_a_process(tmp_path):
    """Ctrl-C ends it as any Python program, with every finished step in the log and the model saved."""
    flags = f"rloo.py --batch-size 2 --max-new-tokens 8 --steps 3000 --log {tmp_path / 'log'} --save {tmp_path / 'model'}"
    process = subprocess.Popen([sys.executable, *flags.split()], cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def records():
        return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    try:
        while not (tmp_path / "log").exists() or len(records()) < 4:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    log = records()
    assert process.returncode not in (0, 1) and errors.rstrip().endswith("KeyboardInterrupt")
    assert [record["step"] for record in log[1:]] == list(range(len(log) - 1)) and "reward" in log[-1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model")

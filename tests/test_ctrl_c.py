"""Ctrl-C in the middle of a step: catches a finished step or a trained model that is lost, a second Ctrl-C that is not heard, and a
handler that stays behind, so that a notebook swallows the next one.
"""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

QUICK = "--batch-size 2 --group-size 2 --max-new-tokens 8 --eval-size 2"
BOTH = pytest.mark.parametrize("script", ["gsm8k_grpo", "gsm8k_sft_grpo"])


@pytest.fixture(autouse=True)
def handler():
    """Python's own during each test, whoever started it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def in_step(monkeypatch):
    """in_step(2, f): calls f in the middle of the second step, be it of SFT or of GRPO."""

    def in_step(number, f):
        choices, calls = random.choices, []

        def watched(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                f()
            return choices(*args, **kwargs)

        monkeypatch.setattr(random, "choices", watched)

    return in_step


def press():
    signal.raise_signal(signal.SIGINT)


def press_twice():
    press()
    press()


def fail():
    raise ZeroDivisionError


def records(folder):
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def command(script, folder):
    return f"{script}.py {QUICK} --log {folder / 'log'} --save {folder / 'model'}"


def saved(g, folder):
    stored = AutoModelForCausalLM.from_pretrained(folder / "model").parameters()
    return all(torch.equal(a, b) for a, b in zip(g["model"].parameters(), stored, strict=True))


@BOTH
def test_the_running_step_is_finished_saved_and_evaluated(main, tmp_path, in_step, handler, script):
    sft = ["sft", "sft"] if script == "gsm8k_sft_grpo" else []  # a step and its evaluation
    in_step(3 if sft else 2, press)
    g = main(command(script, tmp_path) + (" --sft-steps 1" if sft else ""))
    log = records(tmp_path)
    assert [record.get("phase", "grpo") for record in log] == ["base", *sft, "grpo", "grpo", "grpo"]
    assert [record["step"] for record in log[-3:]] == [0, 1, 2] and "eval" in log[-1]
    assert len(g["history"]) == 2 and saved(g, tmp_path) and signal.getsignal(signal.SIGINT) is handler


def test_in_the_sft_phase(main, tmp_path, in_step, handler):
    """No GRPO, and the one evaluation that is left is of SFT."""
    in_step(2, press)
    g = main(command("gsm8k_sft_grpo", tmp_path))
    log = records(tmp_path)
    assert [record["phase"] for record in log] == ["base", "sft", "sft", "sft"]
    assert ["eval" in record for record in log] == [True, False, False, True] and g["history"] == []
    assert saved(g, tmp_path) and signal.getsignal(signal.SIGINT) is handler


@BOTH
@pytest.mark.parametrize("f, error", [(press_twice, KeyboardInterrupt), (fail, ZeroDivisionError)])
def test_a_second_one_and_an_error_end_it_at_once(main, tmp_path, in_step, handler, script, f, error):
    """Nothing more is logged or saved, and the old handler is back."""
    in_step(2, f)
    with pytest.raises(error):
        main(command(script, tmp_path))
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(records(tmp_path)) == 2 and not list((tmp_path / "model").iterdir())


def test_a_toy_script_ends_as_any_python_program(tmp_path):
    """A process of its own. The log keeps every finished step."""
    flags = f"rloo.py --batch-size 2 --max-new-tokens 8 --steps 3000 --log {tmp_path / 'log'}"
    process = subprocess.Popen([sys.executable, *flags.split()], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "log").exists() or len(records(tmp_path)) < 4:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    log = records(tmp_path)
    assert process.returncode not in (0, 1) and errors.rstrip().endswith("KeyboardInterrupt")
    assert [record["step"] for record in log[1:]] == list(range(len(log) - 1)) and "reward" in log[-1]

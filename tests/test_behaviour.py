"""What a person meets at the command line: flags, files, refusals. Catches lost work and a traceback where a line would do."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PRESENT, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICK = ("--steps", 2, "--batch-size", 2, "--max-new-tokens", 16)
each = pytest.mark.parametrize("script", PRESENT)


@each
def test_saved_model_starts_where_training_ended(run, tmp_path, script):
    first = run(script, *QUICK, "--lr", 2e-5, "--save", tmp_path / "new" / "model")
    assert first.returncode == 0, first.stderr
    assert str(tmp_path / "new" / "model") in first.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model", dtype=torch.float32)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "model").chat_template
    again = run(script, *QUICK, "--model", tmp_path / "new" / "model")
    assert again.log[0]["eval"] == first.log[-1]["eval"] != first.log[0]["eval"]


@each
def test_log_and_same_seed_same_numbers(run, script):
    def numbers(done):
        return [
            {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_s")} for record in done.log
        ]

    first, again, other = (run(script, *QUICK, "--seed", seed) for seed in (3, 3, 4))
    assert numbers(first) == numbers(again) != numbers(other)
    assert [record["step"] for record in first.log] == [0, 0, 1, 2]
    assert "eval" in first.log[0] and "eval" in first.log[-1] and "grad_norm" in first.log[1]


@each
@pytest.mark.parametrize(
    "flag, value",
    [("--steps", 0), ("--steps", "many"), ("--batch-size", -1), ("--max-new-tokens", 0), ("--lr", -1e-6), ("--lr", "nan"),
     ("--lr", "inf"), ("--seed", -1), ("--seed", 2**32), ("--no-such-flag", 1)],
)  # fmt: skip
def test_bad_flag_is_refused(run, script, flag, value):
    done = run(script, flag, value)
    assert done.returncode == 2 and flag in done.stderr and "Traceback" not in done.stderr
    assert done.log == [] and "before" not in done.stdout


@each
def test_paths_are_checked_before_anything_is_loaded(run, tmp_path, script):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("data")
    for flag, path in (
        ("--save", tmp_path / "full"),
        ("--save", tmp_path / "full" / "precious"),
        ("--log", tmp_path / "no" / "log"),
    ):
        done = run(script, flag, path)
        assert (
            done.returncode == 2
            and flag in done.stderr
            and "Traceback" not in done.stderr
            and done.stdout == ""
        )
    assert (tmp_path / "full" / "precious").read_text() == "data"


@each
def test_help_shows_the_defaults(run, script):
    done = run(script, "--help")
    assert done.returncode == 0 and "default: 30" in done.stdout and "tests/tiny" in done.stdout


@each
def test_model_that_cannot_be_had(run, tmp_path, script):
    (tmp_path / "empty").mkdir()
    AutoTokenizer.from_pretrained(ROOT / "tests/tiny-qwen").save_pretrained(tmp_path / "no-weights")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tests/tiny-qwen")
    base = AutoTokenizer.from_pretrained(ROOT / "tests/tiny-qwen")
    base.chat_template = None
    model.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    for name in (
        tmp_path / "empty",
        tmp_path / "no-weights",
        tmp_path / "base",
        tmp_path / "missing",
        "nobody/nothing",
    ):
        done = run(script, "--model", name)
        assert done.returncode == 1 and str(name) in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()[-1]) < 500 and "--model" in done.stderr


@each
def test_ctrl_c_evaluates_and_saves(tmp_path, script):
    command = [
        sys.executable,
        f"{script}.py",
        "--steps",
        "1000",
        "--log",
        tmp_path / "log",
        "--save",
        tmp_path / "model",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "log").exists() or len((tmp_path / "log").read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert process.returncode == 0 and "Traceback" not in out and "after" in out
    assert "eval" in log[-1] and log[-1]["step"] == len(log) - 2
    assert os.path.exists(tmp_path / "model" / "model.safetensors")


@each
def test_nan_stops_the_run_and_saves_nothing(run, tmp_path, script):
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tests/tiny-qwen")
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(ROOT / "tests/tiny-qwen").save_pretrained(tmp_path / "nan")
    done = run(script, *QUICK, "--model", tmp_path / "nan", "--save", tmp_path / "out")
    assert done.returncode == 1 and "nan" in done.stderr.lower() and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())

"""What a person meets at the command line: flags, files, refusals. Catches lost work and a traceback where a line would do.

Most of it runs in this process (`main`), which is the script all the same; Ctrl-C needs a process of its own.
"""

import importlib
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PRESENT, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

SHORT = "--batch-size 2 --max-new-tokens 16"
TINY = ROOT / "tests/tiny-qwen"
each = pytest.mark.parametrize("script", PRESENT)


def quick(script):
    """The script and flags that make a step short; GSM8K's evaluation too."""
    return f"{script}.py {SHORT}" + (" --eval-size 4" if script.startswith("gsm8k") else "")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@each
def test_saved_model_starts_where_training_ended(main, capsys, tmp_path, script):
    new, log = tmp_path / "new" / "model", tmp_path / "log"
    g = main(f"{quick(script)} --steps 2 --lr 2e-5 --save {new} --log {log}")
    assert f"saved in {new}" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(new), AutoTokenizer.from_pretrained(new)
    assert tokenizer.chat_template and model.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), g["model"].parameters(), strict=True))
    last = records(log)[-1]["eval"]
    main(f"{quick(script)} --steps 1 --model {new} --log {log}")
    assert records(log)[0]["eval"] == last


@each
def test_log_and_same_seed_same_numbers(main, tmp_path, script):
    def numbers(seed):
        g = main(f"{quick(script)} --steps 2 --seed {seed} --log {tmp_path / 'log'}")
        log = records(tmp_path / "log")
        steps = [record for record in log if "seconds" in record]
        assert [r["step"] for r in steps] == [0, 1] and steps == g["history"] and "grad_norm" in steps[0]
        first, last = log[0], log[-1]
        assert {"step", "eval"} <= first.keys() <= {"step", "eval", "phase"} and first["step"] == 0
        assert first.keys() == last.keys() and last["step"] == 2
        return [{k: v for k, v in record.items() if k != "seconds"} for record in log]

    assert numbers(3) == numbers(3) != numbers(4)


def refused(monkeypatch, capsys, script, *flags):
    """What parse_args prints when it exits with code 2."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).parse_args()
    assert end.value.code == 2
    return capsys.readouterr().err


BAD = "--steps 0, --steps many, --batch-size -1, --max-new-tokens 0, --lr -1e-6, --lr nan, --lr inf, --seed -1, --seed 5e9, --nope 1"
BAD_CLIPPED = "--group-size 0, --update-epochs 0, --epsilon nan, --beta -1"


GROUPED = ("minimal_grpo", "rloo", "gsm8k_grpo", "gsm8k_sft_grpo")  # PPO's critic needs no group


@each
@pytest.mark.parametrize("flags", BAD.split(", "))
def test_bad_flag_is_refused(monkeypatch, capsys, script, flags):
    assert flags.split()[0] in refused(monkeypatch, capsys, script, *flags.split())


@pytest.mark.parametrize("script", [name for name in PRESENT if name in ("minimal_grpo", "minimal_ppo")])
@pytest.mark.parametrize("flags", BAD_CLIPPED.split(", "))
def test_bad_flag_of_the_clipped_is_refused(monkeypatch, capsys, script, flags):
    assert flags.split()[0] in refused(monkeypatch, capsys, script, *flags.split())


@pytest.mark.parametrize("script", [name for name in PRESENT if name in GROUPED])
def test_one_completion_is_no_group(monkeypatch, capsys, script):
    assert "--group-size" in refused(monkeypatch, capsys, script, "--group-size", 1)


@pytest.mark.skipif("minimal_ppo" not in PRESENT, reason="not there yet")
@pytest.mark.parametrize("flags", ["--gamma 1.5", "--lam -0.1", "--critic-lr -1"])
def test_bad_flag_of_ppo_is_refused(monkeypatch, capsys, flags):
    assert flags.split()[0] in refused(monkeypatch, capsys, "minimal_ppo", *flags.split())


@each
def test_paths_are_checked_before_anything_is_loaded(monkeypatch, capsys, tmp_path, script):
    (tmp_path / "full").mkdir()
    file = tmp_path / "full" / "precious"
    file.write_text("data")
    for flag, path in [
        ("--save", tmp_path / "full"),
        ("--save", file),
        ("--save", file / "x"),
        ("--log", tmp_path / "no" / "log"),
    ]:
        assert flag in refused(monkeypatch, capsys, script, flag, path)
    assert file.read_text() == "data" and [*(tmp_path / "full").iterdir()] == [file]


@each
def test_help_shows_the_defaults(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).parse_args()
    text = capsys.readouterr().out
    assert end.value.code == 0 and "default: 30" in text and "tests/tiny" in text


@each
def test_model_that_cannot_be_had(main, capsys, tmp_path, script):
    """No model, no weights, no template, no such folder, and a Hub id while offline: one line each, and exit code 1."""
    (tmp_path / "empty").mkdir()
    tokenizer, model = AutoTokenizer.from_pretrained(TINY), AutoModelForCausalLM.from_pretrained(TINY)
    tokenizer.save_pretrained(tmp_path / "no-weights")
    tokenizer.chat_template = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    for name in (
        tmp_path / "empty",
        tmp_path / "no-weights",
        tmp_path / "base",
        tmp_path / "missing",
        "nobody/nothing",
    ):
        with pytest.raises(SystemExit) as end:
            main(f"{script}.py --model {name}")
        line = end.value.code  # a string: printed to stderr, exit code 1
        assert (
            line.startswith((f"--model {name}: ", f"--model {name}, --dataset tests/tiny-gsm8k: "))
            and "HF_TOKEN" in line
            and "tests/tiny" in line
        )
        assert len(line.splitlines()) == 1 and len(line) < 700
    assert "before" not in capsys.readouterr().out


@each
def test_ctrl_c_evaluates_and_saves(tmp_path, script):
    flags = f"{quick(script)} --steps 300 --log {tmp_path / 'log'} --save {tmp_path / 'model'}"
    command = [sys.executable, *flags.split()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not (tmp_path / "log").exists() or len(records(tmp_path / "log")) < 7:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    log = records(tmp_path / "log")
    assert process.returncode == 0 and "Traceback" not in out and ("after: " in out or "grpo: " in out)
    assert "eval" in log[-1] and log[-1]["step"] == len([record for record in log if "seconds" in record]) > 0
    assert (tmp_path / "model" / "model.safetensors").exists()


@each
def test_nan_in_the_weights_stops_the_run_and_saves_nothing(main, tmp_path, script):
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.model.norm.weight.data[3] = float("nan")
    for part in (model, AutoTokenizer.from_pretrained(TINY)):
        part.save_pretrained(tmp_path / "nan")
    with pytest.raises(SystemExit) as end:
        main(f"{quick(script)} --steps 2 --model {tmp_path / 'nan'} --save {tmp_path / 'out'}")
    assert "stopped in step 0, nothing saved" in end.value.code
    assert not list((tmp_path / "out").iterdir())

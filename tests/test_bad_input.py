"""The script as a process, given what a person gets wrong: one line that names the cause, the exit code, no traceback, nothing written.

Catches an exception nobody turned into a line, a check that comes after the work, a saved model that should not be, a token that leaks.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

SECRET = "hf_" + "NotARealTokenOnlyATest"
TINY = ROOT / "tests/tiny-qwen"


@pytest.fixture
def model_folder(tmp_path):
    """model_folder("base"): a model without chat template; "nan": one with a NaN in its weights; "empty": none."""

    def model_folder(kind):
        folder = tmp_path / kind
        folder.mkdir()
        if kind != "empty":
            model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
            if kind == "nan":
                model.model.norm.weight.data[3] = float("nan")
            else:
                tokenizer.chat_template = None
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return model_folder


@pytest.mark.parametrize(
    "script, flags, named",
    [
        ("minimal_sft", "--steps 0", "--steps"),
        ("minimal_dpo", "--lr nan", "--lr"),
        ("minimal_grpo", "--group-size 1", "--group-size"),
        ("minimal_ppo", "--lam 1.5", "--lam"),
        ("reinforce", "--baseline median", "--baseline"),
        ("rloo", "--group-size 1", "--group-size"),
        ("gsm8k_grpo", "--log {}/no/log", "--log"),
        ("gsm8k_sft_grpo", "--save {}/full", "--save"),
        ("minimal_grpo", "--stpes 3", "--stpes"),
    ],
)
def test_refused_at_the_start(run, tmp_path, script, flags, named):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("data")
    done = run(script, *flags.format(tmp_path).split())
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert named in done.stderr.splitlines()[-1] and not done.stdout
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"] and not done.log


@pytest.mark.parametrize(
    "script, kind, cause",
    [
        ("minimal_dpo", "empty", "--model"),
        ("reinforce", "base", "chat template"),
        ("minimal_sft", "meta-llama/Llama-3.2-1B-Instruct", "--model"),  # gated, and no way to the Hub
        ("rloo", "nobody/nothing", "offline"),
    ],
)
def test_model_that_cannot_be_had(run, model_folder, script, kind, cause):
    name = model_folder(kind) if kind in ("empty", "base") else kind
    done = run(script, "--model", name, HF_TOKEN=SECRET)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr and SECRET not in done.stderr + done.stdout
    assert line.startswith(f"--model {name}: ") and cause in line and "HF_TOKEN=... in .env" in line
    assert "--model tests/tiny-" in line and not done.stdout and not done.log


def test_gated_model_without_a_token(run, tmp_path):
    """What the Hub's own refusal looks like: the library raises an OSError that says gated, and it is passed on in one line."""
    (tmp_path / "sitecustomize.py").write_text(
        "import transformers\n"
        "def gated(name, **kwargs):\n"
        "    raise OSError('You are trying to access a gated repo.\\nMake sure to have access to it at ' + name)\n"
        "transformers.AutoModelForCausalLM.from_pretrained = gated\n"
    )
    done = run("reinforce", "--model", "meta-llama/Llama-3.2-1B-Instruct", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "gated repo." in line and "Make sure to have access" in line and "HF_TOKEN=... in .env" in line


@pytest.mark.parametrize(
    "rows, splits",
    [
        ('{"frage": "Was?", "answer": "#### 1"}', ("train", "test")),
        ('{"question": "What?", "answer": "#### 1"}', ("train",)),
        ("no json", ("train", "test")),
        ("", ()),
    ],
)
def test_data_that_cannot_be_had(run, tmp_path, rows, splits):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in splits:
        (folder / f"{split}.jsonl").write_text(rows + "\n")
    done = run("gsm8k_grpo", "--dataset", folder)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr and not done.stdout
    assert f"--dataset {folder}: " in line and "--dataset tests/tiny-gsm8k" in line


@pytest.mark.parametrize("script", ["minimal_grpo", "minimal_sft"])
def test_nan_stops_the_run_and_saves_nothing(run, model_folder, tmp_path, script):
    done = run(script, "--model", model_folder("nan"), "--save", tmp_path / "out", "--batch-size", "2")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "after" not in done.stdout
    assert "stopped in step 0, nothing saved: " in done.stderr.strip().splitlines()[-1]
    assert not list((tmp_path / "out").iterdir())


def test_the_token_is_nowhere(run, tmp_path):
    flags = "--steps 1 --batch-size 2 --max-new-tokens 4".split()
    done = run("minimal_grpo", *flags, "--save", tmp_path / "out", HF_TOKEN=SECRET)
    assert done.returncode == 0 and SECRET not in done.stdout + done.stderr + json.dumps(done.log)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 4 and not any(SECRET.encode() in path.read_bytes() for path in files)


def test_second_ctrl_c_stops_at_once(tmp_path):
    """The first is taken in the training loop, the second in the evaluation after it; a long one, so that it can be met."""
    flags = f"--steps 3000 --batch-size 1 --group-size 2 --eval-size 200 --log {tmp_path / 'log'} --save {tmp_path / 'out'}"
    process = subprocess.Popen(
        [sys.executable, "gsm8k_grpo.py", *flags.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for awaited in ("step 2 ", "Ctrl-C: "):
            seen = ""
            while awaited not in seen:
                part = process.stdout.read(1)
                assert part, "ended too soon"
                seen += part
            process.send_signal(signal.SIGINT)
        start = time.time()
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and time.time() - start < 10
    assert not list((tmp_path / "out").iterdir())

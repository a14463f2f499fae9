"""The script as a process, given what a person gets wrong: the cause by name, the exit code, no traceback, nothing written.

Catches an exception that nobody turned into a message, a check that comes after the work, a token that leaks.
"""

import json
import os
import signal
import subprocess
import sys
import time

from conftest import ROOT

SECRET = "hf_" + "NotARealTokenOnlyATest"


def test_refused_at_the_start(run):
    done = run("minimal_grpo", "--group-size", "1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "--group_size must be at least 2" in done.stderr.splitlines()[-1] and not done.stdout and not done.log
    )


def test_model_that_cannot_be_had(run):
    """Gated, and no way to the Hub."""
    model = "meta-llama/Llama-3.2-1B-Instruct"
    done = run("minimal_sft", "--model", model, HF_TOKEN=SECRET)
    assert done.returncode == 1 and "Traceback" not in done.stderr and SECRET not in done.stderr + done.stdout
    message = done.stderr[done.stderr.index(f"--model {model}") :]
    assert "offline" in message and not done.stdout and not done.log


def test_gated_model_without_a_token(run, tmp_path):
    """What the Hub's own refusal looks like: the library raises an OSError that says gated, and all of it is passed on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import transformers\n"
        "def gated(name, **kwargs):\n"
        "    raise OSError('You are trying to access a gated repo.\\nMake sure to have access to it at ' + name)\n"
        "transformers.AutoModelForCausalLM.from_pretrained = gated\n"
    )
    model = "meta-llama/Llama-3.2-1B-Instruct"
    done = run("reinforce", "--model", model, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"gated repo.\nMake sure to have access to it at {model}" in done.stderr


def test_the_token_is_nowhere(run, tmp_path):
    flags = "--steps 1 --batch-size 2 --max-new-tokens 4".split()
    done = run("minimal_grpo", *flags, "--save", tmp_path / "out", HF_TOKEN=SECRET)
    assert done.returncode == 0 and SECRET not in done.stdout + done.stderr + json.dumps(done.log)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 4 and not any(SECRET.encode() in path.read_bytes() for path in files)


def test_second_ctrl_c_stops_at_once(tmp_path):
    """The first is taken in the middle of a step, the second at once after it: nothing is saved or evaluated."""
    flags = "--steps 3000 --batch-size 8 --group-size 16 --max-new-tokens 96 --eval-size 2"
    flags += f" --log {tmp_path / 'log'} --save {tmp_path / 'out'}"
    process = subprocess.Popen(
        [sys.executable, "gsm8k_grpo.py", *flags.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for awaited in ("step 0 ", "Ctrl-C again"):
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

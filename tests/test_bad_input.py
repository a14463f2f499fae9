"""The script as a process: catches a warning in every reader's run, an error that is swallowed, and a token that leaks."""

import json
import re

import pytest

SECRET = "hf_" + "NotARealTokenOnlyATest"


@pytest.mark.parametrize("script", ["reinforce", "gsm8k_grpo"])
def test_no_warnings_and_no_token(run, tmp_path, script):
    """Nothing but loading bars beside the output, though each warning of something that will go away is an error."""
    flags = f"--steps 1 --batch-size 2 --max-new-tokens 4 --save {tmp_path / 'out'}".split()
    flags += ["--eval-size", 2] if script == "gsm8k_grpo" else []
    done = run(
        script, *flags, HF_TOKEN=SECRET, PYTHONWARNINGS="error::FutureWarning,error::DeprecationWarning"
    )
    pieces = [piece for piece in re.split(r"[\r\n]+", done.stderr) if piece.strip()]
    assert done.returncode == 0 and all(
        re.match(r"(Loading|Generating|Writing) [\w ]+: ", x) for x in pieces
    ), pieces
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 4 and not any(SECRET.encode() in path.read_bytes() for path in files)
    assert SECRET not in done.stdout + done.stderr + json.dumps(done.log)


def test_model_that_cannot_be_had(run):
    """Gated, and no way to the Hub: the library's own words, and not the token."""
    model = "meta-llama/Llama-3.2-1B-Instruct"
    done = run("minimal_sft", "--model", model, HF_TOKEN=SECRET)
    assert done.returncode == 1 and done.stdout == f"--model {model} on cpu, seed 0\n"
    assert not done.log and SECRET not in done.stderr
    assert "offline" in done.stderr[done.stderr.index("\nOSError: ") :]

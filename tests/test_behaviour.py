"""What a person meets at the command line: flags, files, refusals, Ctrl-C. Catches lost work, a flag that is silently ignored, and a
reader's own mistake that is reported without its line.

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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

SHORT = "--batch-size 2 --max-new-tokens 16"
TINY = ROOT / "tests/tiny-qwen"
GSM8K = [name for name in PRESENT if name.startswith("gsm8k")]
TOYS = [name for name in PRESENT if name not in GSM8K]
RL = [name for name in PRESENT if name not in ("minimal_sft", "minimal_dpo")]
each = pytest.mark.parametrize("script", PRESENT)


def quick(script):
    """The script and flags that make a step short; GSM8K's evaluation too."""
    return f"{script}.py {SHORT}" + (" --eval-size 4" if script in GSM8K else "")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(log, script):
    """The step lines of the last phase: what `history` keeps, and, in the RL scripts, each completion."""
    return [r for r in log if ("reward" if script in RL else "loss") in r]


@each
def test_saved_model_starts_where_training_ended(main, tmp_path, script):
    new, log = tmp_path / "new" / "model", tmp_path / "log"
    g = main(f"{quick(script)} --steps 2 --lr 2e-5 --save {new} --log {log}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(new), AutoTokenizer.from_pretrained(new)
    assert tokenizer.chat_template and model.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), g["model"].parameters(), strict=True))
    last = records(log)[-1]["eval"]
    main(f"{quick(script)} --steps 1 --model {new} --log {log}")
    assert records(log)[0]["eval"] == last


@each
def test_one_file_in_an_empty_folder(main, monkeypatch, tmp_path, capsys, script):
    """Alone, without the checkout: --model (and --dataset) are all it needs, and the default is the real model, by its Hub id."""
    (tmp_path / f"{script}.py").write_text((ROOT / f"{script}.py").read_text())
    monkeypatch.setattr("conftest.ROOT", tmp_path)  # where main runs it
    lexical = script in ("reinforce", "rloo")
    data = f"--dataset {ROOT}/tests/tiny-gsm8k" if script in GSM8K else ""
    g = main(f"{quick(script)} --steps 1 --model {ROOT}/tests/tiny-{'llama' if lexical else 'qwen'} {data}")
    assert len(g["history"]) == 1 and str(ROOT / "tests/tiny-") in capsys.readouterr().out
    assert g["MODEL"] == ("meta-llama/Llama-3.2-1B-Instruct" if lexical else "Qwen/Qwen2.5-0.5B-Instruct")
    assert script not in GSM8K or g["DATASET"] == "openai/gsm8k"


@each
def test_the_model_is_saved_before_the_last_evaluation(main, tmp_path, monkeypatch, script):
    """An evaluation that fails (a task that was changed halfway, say) must not lose the model."""
    decode, saved = PreTrainedTokenizerBase.batch_decode, []

    def failing(self, ids, **kwargs):
        if (tmp_path / "out" / "model.safetensors").exists():
            saved.append(1)
            raise ZeroDivisionError
        return decode(self, ids, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "batch_decode", failing)
    with pytest.raises(ZeroDivisionError):
        main(f"{quick(script)} --steps 1 --save {tmp_path / 'out'}")
    assert saved


@each
def test_log_and_same_seed_same_numbers(main, tmp_path, script):
    def numbers(seed):
        g = main(f"{quick(script)} --steps 2 --seed {seed} --log {tmp_path / 'log'}")
        log = records(tmp_path / "log")
        steps = steps_of(log, script)
        assert [r["step"] for r in steps] == [0, 1] and "grad_norm" in steps[0]
        plain = [{k: v for k, v in r.items() if k not in ("samples", "phase")} for r in steps]
        assert plain == g["history"]
        first, last = log[0], log[-1]
        assert {"step", "eval"} <= first.keys() <= {"step", "eval", "phase"} and first["step"] == 0
        assert first.keys() == last.keys() and last["step"] == 2
        if script == "gsm8k_sft_grpo":
            assert [r["phase"] for r in log] == ["base", "sft", "sft", "sft", "sft", "grpo", "grpo", "grpo"]
        return log

    assert numbers(3) == numbers(3) != numbers(4)


@pytest.mark.parametrize("script", RL)
def test_the_log_has_every_completion(main, tmp_path, script):
    """Each with its prompt, its text and all that score says of it; their means are what the step reports."""
    g = main(f"{quick(script)} --steps 2 --log {tmp_path / 'log'}")
    last = steps_of(records(tmp_path / "log"), script)[-1]
    assert len(last["samples"]) == len(g["texts"]) == len(g["ids"])
    for sample, prompt, text, answer in zip(last["samples"], g["prompts"], g["texts"], g["answers"]):
        assert sample == {"prompt": prompt, "text": text} | g["score"](text, answer)
    for name in g["score"]("#### 1", "#### 1" if script in GSM8K else 1):
        mean = sum(sample[name] for sample in last["samples"]) / len(last["samples"])
        assert last[name] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    "own, error",
    [
        ("{'reward': 1.0, 'tokens': 3.0}", TypeError),  # which of the two would be reported?
        ("{'reward': 1.0, 'kl': 3.0}", TypeError),
        ("{'reward': 1.0} | ({'tags': 1.0} if '<' in text else {})", KeyError),
    ],
)
def test_same_name_twice_or_one_that_is_missing(main, tmp_path, own, error):
    """Neither is lost without a word."""
    old = '{"reward": float(one_pair and f"<answer>{answer}</answer>" in text)}'
    path = copy_with("minimal_grpo", tmp_path, old, own)
    with pytest.raises(error, match="tokens|kl|tags"):
        main(f"{path} {SHORT} --steps 1")


def copy_with(script, folder, old, new):
    """A copy of the script in which a reader has changed one place; run from the checkout."""
    source = (ROOT / f"{script}.py").read_text()
    assert source.count(old) == 1
    path = folder / "changed.py"
    path.write_text(source.replace(old, new))
    return path


REWARD = {
    **dict.fromkeys(["minimal_grpo", "minimal_ppo"], '{"reward": float('),
    **dict.fromkeys(["reinforce", "rloo"], '{"reward": ttr - args.brevity_penalty_scale * missing,'),
    **dict.fromkeys(GSM8K, '{"reward": float(strict),'),
}


@pytest.mark.parametrize("script", RL)
def test_a_reward_may_be_any_number(main, capsys, tmp_path, script):
    """An int, a bool, negative, above 1; and whatever else score returns is in the evaluation, in the step line and in the log."""
    value = "[len(text), True, -2, 3][len(text) % 4]"
    own = REWARD[script].replace('"reward": ', f'"twice": 2 * {value}, "reward": {value}, "old": ')
    path = copy_with(script, tmp_path, REWARD[script], own)
    flags = " ".join(quick(script).split()[1:])
    g = main(f"{path} {flags} --steps 1 --log {tmp_path / 'log'}")
    out = capsys.readouterr().out
    first, *_, step, last = records(tmp_path / "log")
    for numbers in (first["eval"], step, last["eval"]):
        assert numbers["twice"] == pytest.approx(2 * numbers["reward"])
    values = [[len(text), True, -2, 3][len(text) % 4] for text in g["texts"]]
    assert step["reward"] == pytest.approx(sum(values) / len(values))
    assert g["rewards"].dtype == torch.float32 and g["rewards"].tolist() == values
    assert out.count(f"twice {step['twice']:.4g}") >= 1 and out.count("twice ") >= 3


@pytest.mark.parametrize("script", PRESENT)
def test_a_readers_own_mistake_shows_its_line(main, tmp_path, script):
    """A shape mistake in the loss is a RuntimeError; it must reach whoever made it, with the line."""
    old = "        loss.backward()\n"
    source = (ROOT / f"{script}.py").read_text()
    path = tmp_path / "changed.py"
    path.write_text(source.replace(old, old.replace("loss.", "(loss * torch.ones(3) @ torch.ones(5)).")))
    flags = " ".join(quick(script).split()[1:])
    with pytest.raises(RuntimeError) as error:
        main(f"{path} --steps 1 {flags}")
    lines = [str(entry.statement) for entry in error.traceback if entry.path == path]
    assert lines and "(loss * torch.ones(3) @ torch.ones(5)).backward()" in lines[-1]


def refused(main, capsys, script, flags):
    """What is printed when the script exits with code 2, before anything is loaded."""
    with pytest.raises(SystemExit) as end:
        main(f"{script}.py --model /nowhere {flags}")
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].replace("_", "-")


BAD = {
    **dict.fromkeys(
        PRESENT, "--steps 0, --steps many, --batch-size -1, --max-new-tokens 0, --lr -1e-6, --lr nan"
    ),
}
BAD_OF = {
    "minimal_dpo": "--beta 0, --beta nan",
    "minimal_grpo": "--group-size 1, --update-epochs 0, --epsilon nan, --beta -1",
    "minimal_ppo": "--group-size 0, --update-epochs 0, --epsilon -1, --beta nan, --gamma -1, --lam nan, --critic-lr -1",
    "reinforce": "--ema-beta -0.1, --brevity-penalty-scale nan, --baseline median",
    "rloo": "--group-size 1, --brevity-penalty-scale -1",
    "gsm8k_grpo": "--group-size 1, --micro-batch-size 0, --eval-size 0, --update-epochs 0, --beta nan",
    "gsm8k_sft_grpo": "--group-size 1, --micro-batch-size 0, --eval-size 0, --sft-steps 0, --epsilon -0.1",
}


@each
def test_bad_flags_are_refused_by_name(main, capsys, script):
    for flag in (BAD[script] + ", " + BAD_OF.get(script, "--nope 1")).split(", "):
        assert flag.split()[0] in refused(main, capsys, script, flag)


@each
def test_values_that_make_sense_are_not_refused(main, script):
    """No range is guessed: a beta or a penalty above 1 is a choice."""
    flags = {"minimal_dpo": "--beta 2", "minimal_grpo": "--beta 2 --epsilon 1.5", "minimal_ppo": "--beta 3"}
    flags |= dict.fromkeys(["reinforce", "rloo"], "--brevity-penalty-scale 5")
    g = main(f"{quick(script)} --steps 1 --lr 0 --batch_size 3 {flags.get(script, '')}")
    assert len(g["history"]) == 1 and g["args"].batch_size == 3


@each
def test_help_explains_every_flag(main, capsys, script):
    with pytest.raises(SystemExit) as end:
        main(f"{script}.py --help")
    text = " ".join(capsys.readouterr().out.split())
    for name, field in importlib.import_module(script).Args.__dataclass_fields__.items():
        assert f"--{name}" in text and f"{field.metadata['help']} (default: {field.default})" in text
    assert end.value.code == 0 and "tests/tiny" in text


@each
def test_paths_that_cannot_be_written(main, tmp_path, script):
    """Exit code 1 before any training, the flag and the library's own words; an existing log survives a mistyped model."""
    file = tmp_path / "precious"
    file.write_text("data")
    for flag, path in [("--save", file), ("--save", file / "x"), ("--log", tmp_path / "no" / "log")]:
        with pytest.raises(SystemExit) as end:
            main(f"{quick(script)} {flag} {path}")
        assert flag in end.value.code and str(path) in end.value.code
    with pytest.raises(SystemExit):
        main(f"{quick(script)} --model {tmp_path / 'missing'} --log {file}")
    assert file.read_text() == "data"


@pytest.mark.parametrize("script", GSM8K)
@pytest.mark.parametrize("rows, splits", [("no json", ("train", "test")), ("", ())])
def test_data_that_cannot_be_had(main, tmp_path, rows, splits, script):
    """The library's own message, exit code 1; columns of another name are a KeyError that names the column."""
    for split in splits:
        (tmp_path / f"{split}.jsonl").write_text(rows + "\n")
    with pytest.raises(SystemExit) as end:
        main(f"{script}.py --dataset {tmp_path}")
    assert f"--dataset {tmp_path}, --log or --save: " in end.value.code
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"frage": "Was?", "answer": "#### 1"}\n')
    with pytest.raises(KeyError, match="question"):
        main(f"{script}.py --dataset {tmp_path}")


@each
def test_model_that_cannot_be_had(main, capsys, tmp_path, script):
    """No model, no weights, no such folder, and a Hub id while offline: the library's own message, exit code 1."""
    (tmp_path / "empty").mkdir()
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "no-weights")
    for name in (tmp_path / "empty", tmp_path / "no-weights", tmp_path / "missing", "nobody/nothing"):
        with pytest.raises(SystemExit) as end:
            main(f"{script}.py --model {name}")
        assert end.value.code.startswith("--model") and str(name) in end.value.code
    assert "step" not in capsys.readouterr().out


def interrupted(script, tmp_path, *more):
    """The script's process after Ctrl-C in the third step or later: return code, output, log."""
    flags = f"{quick(script)} --steps 3000 --log {tmp_path / 'log'} --save {tmp_path / 'model'}"
    command = [sys.executable, *flags.split(), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not (tmp_path / "log").exists() or len(records(tmp_path / "log")) < 7:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, records(tmp_path / "log")


@pytest.mark.parametrize("script", GSM8K)
def test_ctrl_c_finishes_the_step_saves_and_evaluates(tmp_path, script):
    code, out, log = interrupted(script, tmp_path)
    assert code == 0 and "Traceback" not in out and "Ctrl-C" in out
    assert "eval" in log[-1] and log[-1]["step"] == len(steps_of(log, script)) > 0
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_ctrl_c_ends_a_toy_script_as_any_python_program(tmp_path):
    """The log keeps every finished step."""
    code, out, log = interrupted("rloo", tmp_path)
    assert code not in (0, 1) and "KeyboardInterrupt" in out
    assert [r["step"] for r in steps_of(log, "rloo")] == list(range(len(log) - 1)) and len(log) >= 7


@each
def test_nan_in_the_weights_saves_nothing(main, tmp_path, script):
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.model.norm.weight.data[3] = float("nan")
    for part in (model, AutoTokenizer.from_pretrained(TINY)):
        part.save_pretrained(tmp_path / "nan")
    with pytest.raises(RuntimeError):
        main(f"{quick(script)} --steps 2 --model {tmp_path / 'nan'} --save {tmp_path / 'out'}")
    assert not list((tmp_path / "out").iterdir())

"""What a person meets at the command line: flags, files, what is printed, errors. Catches lost work, a flag that is silently ignored,
a character that the terminal lacks, and a reader's own mistake that is reported without its line.

It runs in this process (`main`), which is the script all the same.
"""

import importlib
import io
import json
import re
import sys

import pytest
import torch
import transformers
from conftest import PRESENT, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

SHORT = "--batch-size 2 --max-new-tokens 16"
TINY = ROOT / "tests/tiny-qwen"
HUB = {"qwen": "Qwen/Qwen2.5-Coder-0.5B-Instruct", "llama": "HuggingFaceTB/SmolLM2-135M-Instruct"}
GSM8K = [name for name in PRESENT if name.startswith("gsm8k")]
TOYS = [name for name in PRESENT if name not in GSM8K]
RL = [name for name in PRESENT if name not in ("minimal_sft", "minimal_dpo")]
KIND = {name: "llama" if name in ("reinforce", "rloo") else "qwen" for name in PRESENT}
each = pytest.mark.parametrize("script", PRESENT)


def quick(script):
    """The script and flags that make a step short; GSM8K's evaluation too."""
    return f"{script}.py {SHORT}" + (" --eval-size 4" if script in GSM8K else "")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(log, script):
    """The step lines of the last phase; in the RL scripts they have each completion."""
    return [r for r in log if ("reward" if script in RL else "loss") in r]


def sft_steps(script):
    """Steps of an earlier phase, which the numbers of the last one continue."""
    return 8 if script == "gsm8k_sft_grpo" else 0


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@each
def test_saved_model_starts_where_training_ended(main, tmp_path, script):
    new = tmp_path / "new" / "model"
    g = main(f"{quick(script)} --steps 1 --lr 2e-5 --save {new}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(new), AutoTokenizer.from_pretrained(new)
    assert tokenizer.chat_template and model.dtype == torch.float32 and same(model, g["model"])
    none = "--steps 0 --sft-steps 0" if script == "gsm8k_sft_grpo" else "--steps 0"
    again = main(f"{quick(script)} {none} --model {new}")
    assert same(again["model"], g["model"]) and again["history"] == []


@each
def test_one_file_in_an_empty_folder(main, monkeypatch, tmp_path, capsys, script):
    """Alone, without the checkout: --model (and --dataset) are all it needs, and the default is the real model, by its Hub id."""
    (tmp_path / f"{script}.py").write_text((ROOT / f"{script}.py").read_text())
    monkeypatch.setattr("conftest.ROOT", tmp_path)  # where main runs it
    data = f"--dataset {ROOT}/tests/tiny-gsm8k" if script in GSM8K else ""
    g = main(f"{quick(script)} --steps 1 --model {ROOT}/tests/tiny-{KIND[script]} {data}")
    assert (
        len(g["history"]) == sft_steps(script) + 1
        and f"--model {ROOT}/tests/tiny-" in capsys.readouterr().out
    )
    assert g["MODEL"] == HUB[KIND[script]] and (script not in GSM8K or g["DATASET"] == "openai/gsm8k")


@each
def test_the_model_is_saved_before_the_last_evaluation(main, tmp_path, monkeypatch, script):
    """An evaluation that fails (a task that was changed halfway, say) must not lose the model."""
    decode, saved = PreTrainedTokenizerBase.decode, []

    def failing(self, ids, **kwargs):
        if (tmp_path / "out" / "model.safetensors").exists():
            saved.append(1)
            raise ZeroDivisionError
        return decode(self, ids, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", failing)
    with pytest.raises(ZeroDivisionError):
        main(f"{quick(script)} --steps 1 --save {tmp_path / 'out'}")
    assert saved


@each
def test_log_and_same_seed_same_numbers(main, tmp_path, script):
    def numbers(seed):
        g = main(f"{quick(script)} --steps 2 --seed {seed} --log {tmp_path / 'log'}")
        log = records(tmp_path / "log")
        steps = steps_of(log, script)
        first_step = sft_steps(script)
        assert [r["step"] for r in steps] == [first_step, first_step + 1] and "grad_norm" in steps[0]
        plain = [{k: v for k, v in r.items() if k not in ("samples", "phase")} for r in steps]
        assert plain == g["history"][first_step:]
        first, last = log[0], log[-1]
        assert {"step", "eval"} <= first.keys() <= {"step", "eval", "phase"} and first["step"] == 0
        assert first.keys() == last.keys() and last["step"] == first_step + 2
        assert last["eval"]["n"] == len(g["TEST"])
        if script == "gsm8k_sft_grpo":
            assert [r["phase"] for r in log] == ["base", *["sft"] * 9, *["grpo"] * 3]
        return [{k: v for k, v in r.items() if k != "seconds"} for r in log]

    assert numbers(3) == numbers(3) != numbers(4)


@pytest.mark.parametrize("script", RL)
def test_the_log_has_every_completion(main, tmp_path, script):
    """Each with its prompt, its text and all that score says of it; their means are what the step reports."""
    g = main(f"{quick(script)} --steps 2 --log {tmp_path / 'log'}")
    last = steps_of(records(tmp_path / "log"), script)[-1]
    assert len(last["samples"]) == len(g["texts"]) == len(g["ids"])
    for sample, prompt, text, answer in zip(last["samples"], g["prompts"], g["texts"], g["answers"]):
        assert sample == {"prompt": prompt, "text": text} | g["score"](text, answer)
    for name in g["score"]("1", "1" if script in GSM8K else 1):
        mean = sum(sample[name] for sample in last["samples"]) / len(last["samples"])
        assert last[name] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("name", ["tokens", "kl"])
def test_same_name_twice(main, tmp_path, name):
    """Which of the two would be reported?"""
    old = '{"reward": float(one_pair and f"<answer>{answer}</answer>" in text)}'
    path = copy_with("minimal_grpo", tmp_path, old, f"{{'reward': 1.0, {name!r}: 3.0}}")
    with pytest.raises(TypeError, match=name):
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
    **dict.fromkeys(["reinforce", "rloo"], '{"reward": reward,'),
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


@pytest.mark.parametrize("kind", ["torch.tensor", "numpy.float32", "numpy.bool_"])
@pytest.mark.parametrize("script", RL)
def test_a_score_of_another_library(main, tmp_path, script, kind):
    """Numbers of torch or numpy train, and are printed and logged as plain ones."""
    own = REWARD[script].replace(
        '"reward": ', f'"twice": {kind}(2.0), "reward": {kind}(len(text) % 2), "old": '
    )
    path = copy_with(script, tmp_path, REWARD[script], own)
    path.write_text(path.read_text().replace("import dotenv, torch\n", "import dotenv, numpy, torch\n"))
    flags = " ".join(quick(script).split()[1:])
    main(f"{path} {flags} --steps 1 --log {tmp_path / 'log'}")
    first, *_, step, last = records(tmp_path / "log")
    twice = 1 if kind == "numpy.bool_" else 2
    assert first["eval"]["twice"] == step["twice"] == last["eval"]["twice"] == twice
    rewards = [len(sample["text"]) % 2 for sample in step["samples"]]
    assert [sample["reward"] for sample in step["samples"]] == rewards
    assert step["reward"] == pytest.approx(sum(rewards) / len(rewards))


@pytest.mark.parametrize("script", TOYS)
def test_a_test_set_of_any_size(main, tmp_path, capsys, script):
    """None of it means no evaluation; 300 prompts are sampled 128 at a time, with a sign of life after each batch."""
    old = 'if __name__ == "__main__":\n'
    path = copy_with(script, tmp_path, old, "TEST = (TEST * 13)[:300]\n" + old)
    sizes, template = [], PreTrainedTokenizerBase.apply_chat_template
    with pytest.MonkeyPatch.context() as patch:

        def watched(self, chats, **kwargs):
            sizes.append(len(chats))
            return template(self, chats, **kwargs)

        patch.setattr(PreTrainedTokenizerBase, "apply_chat_template", watched)
        main(f"{path} --steps 0 --max-new-tokens 4 --log {tmp_path / 'log'}")
    out = capsys.readouterr().out
    assert [size for size in sizes if size > 2] == [128, 128, 44] * 2
    assert (
        "128 of 300 prompts\r256 of 300 prompts\r300 of 300 prompts\rafter 0 steps, sampled, 300 prompts: "
        in out
    )
    assert records(tmp_path / "log")[0]["eval"]["n"] == 300
    path.write_text(path.read_text().replace("TEST = (TEST * 13)[:300]", "TEST = []"))
    main(f"{path} --steps 1 {SHORT} --log {tmp_path / 'log'}")
    assert "after" not in capsys.readouterr().out and len(records(tmp_path / "log")) == 1


@each
def test_a_readers_own_mistake_shows_its_line(main, tmp_path, script):
    """A shape mistake in the loss is a RuntimeError; it must reach whoever made it, with the line."""
    source = (ROOT / f"{script}.py").read_text()
    path = tmp_path / "changed.py"
    path.write_text(source.replace(" loss.backward()", " (loss * torch.ones(3) @ torch.ones(5)).backward()"))
    flags = " ".join(quick(script).split()[1:])
    with pytest.raises(RuntimeError) as error:
        main(f"{path} --steps 1 {flags}")
    lines = [str(entry.statement) for entry in error.traceback if entry.path == path]
    assert lines and "(loss * torch.ones(3) @ torch.ones(5)).backward()" in lines[-1]


@each
def test_bad_flags_are_refused_by_name(main, capsys, script):
    """By argparse, before anything is loaded."""
    bad = ["--nope 1", "--steps two", "--lr fast"] + ["--baseline median"] * (script == "reinforce")
    bad += ["--max-new 5", "--stepss 3"] + ["--data x"] * (script in GSM8K)  # no abbreviations
    for flag in bad:
        with pytest.raises(SystemExit) as end:
            main(f"{script}.py --model /nowhere {flag}")
        assert end.value.code == 2 and flag.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("script", ["minimal_grpo", "rloo", *GSM8K])
def test_a_group_of_one(main, script):
    """Nothing is compared in it; said before anything is loaded."""
    with pytest.raises(AssertionError, match="--group-size"):
        main(f"{script}.py --model /nowhere --group-size 1")


def test_the_mean_of_a_batch_of_one(main):
    """It is the reward itself, so all advantages would be 0. Other baselines can do with one completion."""
    with pytest.raises(AssertionError, match="--batch-size"):
        main("reinforce.py --model /nowhere --batch-size 1")
    assert main("reinforce.py --steps 1 --batch-size 1 --baseline none --max-new-tokens 8")["grad_norm"] > 0


@each
def test_values_that_make_sense_are_not_refused(main, script):
    """No range is guessed: a beta or a penalty above 1 is a choice."""
    flags = {"minimal_dpo": "--beta 2", "minimal_grpo": "--beta 2 --epsilon 1.5", "minimal_ppo": "--beta 3"}
    flags |= dict.fromkeys(["reinforce", "rloo"], "--brevity-penalty-scale 5")
    g = main(f"{quick(script)} --steps 1 --lr 0 --batch_size 3 {flags.get(script, '')}")
    assert len(g["history"]) == sft_steps(script) + 1 and g["args"].batch_size == 3


@each
def test_help_explains_every_flag(main, capsys, script):
    with pytest.raises(SystemExit) as end:
        main(f"{script}.py --help")
    text = " ".join(capsys.readouterr().out.split())
    for name, field in importlib.import_module(script).Args.__dataclass_fields__.items():
        assert f"--{name}" in text and f"{field.metadata['help']} (default: {field.default})" in text
    assert end.value.code == 0 and "tests/tiny" in text


@each
def test_paths_that_cannot_be_written(main, capsys, tmp_path, script):
    """The library's own error before the first evaluation; an existing log survives a mistyped model."""
    file = tmp_path / "precious"
    file.write_text("data")
    for flag, path in [("--save", file), ("--save", file / "x"), ("--log", tmp_path / "no" / "log")]:
        with pytest.raises(OSError, match=str(path)):
            main(f"{quick(script)} {flag} {path}")
    with pytest.raises((OSError, ValueError), match="missing"):
        main(f"{quick(script)} --model {tmp_path / 'missing'} --log {file}")
    out = capsys.readouterr().out
    assert file.read_text() == "data" and out.count("--model") == 4 and "after 0" not in out


@each
def test_model_that_cannot_be_had(main, capsys, tmp_path, script):
    """No model, no weights, no such folder, and a Hub id while offline: the library's own error."""
    (tmp_path / "empty").mkdir()
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "no-weights")
    for name in (tmp_path / "empty", tmp_path / "no-weights", tmp_path / "missing", "nobody/nothing"):
        with pytest.raises((OSError, ValueError), match=f"{name}|offline"):
            main(f"{script}.py --model {name}")
    assert capsys.readouterr().out.splitlines()[-1] == "--model nobody/nothing on cpu, seed 0"


@pytest.mark.parametrize("script", GSM8K)
def test_data_that_cannot_be_had(main, capsys, tmp_path, script):
    """No such data set, no data in the folder, no columns of these names."""
    with pytest.raises(OSError, match="nobody/nothing"):
        main(f"{script}.py --dataset nobody/nothing")
    with pytest.raises(OSError, match=str(tmp_path)):
        main(f"{script}.py --dataset {tmp_path}")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"frage": "Was?", "answer": "#### 1"}\n')
    with pytest.raises((KeyError, ValueError), match="question"):
        main(f"{script}.py --dataset {tmp_path}")
    assert "after 0" not in capsys.readouterr().out


def terminal(monkeypatch):
    """Standard output as bytes: what has been flushed, in an encoding that knows ASCII only."""
    seen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(seen, encoding="ascii"))
    return seen


@each
def test_the_first_line_is_there_at_once(main, monkeypatch, tiny, script):
    """Before anything is loaded, and the second one before any prompt is encoded, although output that is not flushed may wait."""

    def stop(*args, **kwargs):
        raise ZeroDivisionError

    def stop_at_a_batch(self, chats, padding=False, **kwargs):
        return stop() if padding else template(self, chats, **kwargs)

    size = sum(p.numel() for p in tiny(KIND[script])[0].parameters())
    template = PreTrainedTokenizerBase.apply_chat_template
    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", stop_at_a_batch)
    seen = terminal(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(f"{script}.py --seed 7")
    first, *dataset, second = seen.getvalue().decode().splitlines()
    assert first == f"--model tests/tiny-{KIND[script]} on cpu, seed 7"
    assert dataset == ["--dataset tests/tiny-gsm8k"] * (script in GSM8K)
    assert re.fullmatch(rf"{size:,} parameters, [\d,]+ training prompts", second)
    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", template)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stop)
    seen = terminal(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(f"{script}.py")
    assert seen.getvalue().decode().splitlines() == [f"--model tests/tiny-{KIND[script]} on cpu, seed 0"]


@each
def test_a_character_that_the_terminal_lacks(main, monkeypatch, tmp_path, script):
    """In a prompt, in an answer and in what the model writes: it is escaped, in each line, and the log has it as it is."""
    decode = PreTrainedTokenizerBase.decode
    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", lambda *a, **kw: decode(*a, **kw) + "好")
    if script in GSM8K:
        for split in ("train", "test"):
            row = {"question": "好", "answer": "好\n#### 1好"}
            (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
        path, flags = f"{script}.py", f"--dataset {tmp_path}"
    else:
        answer = 40 if KIND[script] == "llama" else "'好'"
        task = f"TRAIN = TEST = [('好', {answer})]\n"
        if script == "minimal_dpo":  # its own one counts on numbers
            task += "preference_pair = lambda prompt, answer: (answer, 'no')\n"
        old = 'if __name__ == "__main__":\n'
        path, flags = copy_with(script, tmp_path, old, task + old), ""
    seen = terminal(monkeypatch)
    main(f"{path} {SHORT} --steps 1 {flags} --log {tmp_path / 'log'}")
    sys.stdout.flush()
    lines = seen.getvalue().decode().splitlines()
    shown = [line for line in lines if "\\u597d" in line]  # two evaluations and a step; three and nine steps
    assert len(shown) == (12 if script == "gsm8k_sft_grpo" else 3)
    assert all("\\u597d" in part for line in shown for part in line.split("' -> '"))
    assert (
        script not in RL or steps_of(records(tmp_path / "log"), script)[0]["samples"][0]["text"][-1] == "好"
    )


@each
def test_nan_in_the_weights_saves_nothing(main, tmp_path, script):
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.model.norm.weight.data[3] = float("nan")
    for part in (model, AutoTokenizer.from_pretrained(TINY)):
        part.save_pretrained(tmp_path / "nan")
    with pytest.raises(RuntimeError):
        main(f"{quick(script)} --steps 2 --model {tmp_path / 'nan'} --save {tmp_path / 'out'}")
    assert not (tmp_path / "out" / "model.safetensors").exists()

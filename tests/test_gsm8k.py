"""GSM8K's score, data and phases: catches a right answer scored 0 and a wrong one scored 1, two configurations of the data mixed, a
reference from before SFT, and calculator annotations in the targets.
"""

import json
import re

import gsm8k_grpo
import gsm8k_sft_grpo
import pytest
import torch
from conftest import ROOT
from gsm8k_grpo import load_gsm8k, numbers, score
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

REAL = ROOT.parent / "shared" / "gsm8k"
QUICK = "--batch-size 2 --group-size 4 --max-new-tokens 64 --eval-size 4"
BOTH = pytest.mark.parametrize("script", ["gsm8k_grpo", "gsm8k_sft_grpo"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        ("none", []),
        ("18", [18]),
        ("18.", [18]),
        ("18.00", [18]),
        (".5 and 0.5", [0.5, 0.5]),
        ("$18", [18]),
        ("-$1,234.50", [-1234.5]),
        ("$-5", [-5]),
        ("1,000,000", [1000000]),
        ("8{,}000", [8000]),  # LaTeX
        ("1{,}234{,}567.5", [1234567.5]),
        (r"1,\!234", [1234]),
        (r"-\$7", [-7]),
        ("1,8", [1, 8]),
        ("1,0000", [1, 0]),
        ("3, 4", [3, 4]),
        (".0.30", [0]),
        ("1.2.3", [1.2]),
        ("20-5", [20, 5]),
        ("20 -5", [20, -5]),
        ("3/4", [3, 4]),
        ("10^3", [10, 3]),
        ("2*9=18", [2, 9, 18]),
        ("50%", [50]),
        ("x18y", [18]),
        ("$5$$6$", [5, 6]),
        ("--5", [-5]),
        ("−5", [-5]),  # a minus of its own in Unicode
        ("−$5", [-5]),
        ("20−5", [20, 5]),
        ("-$-5", [-5]),
        ("x = ---18.5", [-18.5]),
    ],
)
def test_numbers(text, expected):
    assert numbers(text) == expected


GOLD = "She has 20 - 2 = 18 eggs.\nThe answer is \\boxed{18}."


@pytest.mark.parametrize(
    "completion, reward, lenient",
    [
        ("", 0, 0),
        ("18", 0, 1),
        ("The answer is 18.", 0, 1),
        ("#### 18", 0, 1),
        (r"\boxed{}", 0, 0),
        (r"\boxed", 0, 0),
        (r"\boxed{18}", 1, 1),
        (r"$\boxed{18}$", 1, 1),
        (r"\[ \boxed{18} \]", 1, 1),
        (r"so 20 - 2 = \boxed{18}.", 1, 1),
        (r"\boxed{ 18 }", 1, 1),
        (r"\boxed{18.}", 1, 1),
        (r"\boxed{18.0}", 1, 1),
        (r"\boxed{018}", 1, 1),
        (r"\boxed{$18}", 1, 1),
        (r"\boxed{\$18}", 1, 1),
        (r"\boxed{\$18.00}", 1, 1),
        (r"\boxed{18\%}", 1, 1),
        (r"\boxed{18 eggs}", 1, 1),
        (r"\boxed{x = 18}", 1, 1),
        (r"\boxed{\text{18 dollars}}", 1, 1),
        (r"\boxed{18\text{ dollars}}", 1, 1),
        (r"\boxed{\mathbf{18}}", 1, 1),
        (r"\boxed{18^{\circ}}", 1, 1),
        (r"\boxed{\boxed{18}}", 1, 1),
        ("\\boxed{18}\nThat was problem 4.", 1, 0),
        (r"\boxed{17} no, \boxed{18}", 1, 1),
        (r"\boxed{18} or \boxed{17}", 0, 0),
        (r"\boxed{18} \boxed{}", 0, 1),
        (r"\boxed{18", 0, 1),
        (r"\boxed{17} \boxed{18", 0, 1),
        (r"\boxed{18} no: \boxed{20", 0, 0),
        (r"\boxed{18} no: \boxed{\text{\textbf{20}}}", 0, 0),
        ("\\boxed{17} no:\n\\boxed{18}", 1, 1),
        ("\\boxed{18} no:\n\\boxed{20", 0, 0),
        (r"\boxed{18\,\text{eggs}}", 1, 1),
        (r"\boxed 18", 0, 1),
        (r"boxed{18}", 0, 1),
        (r"\fbox{18}", 0, 1),
        (r"\boxed{}18", 0, 1),
        (r"\boxed{17}", 0, 0),
        (r"\boxed{-18}", 0, 0),
        (r"\boxed{−18}", 0, 0),
        (r"\boxed{118}", 0, 0),
        (r"\boxed{180}", 0, 0),
        (r"\boxed{18.5}", 0, 0),
        (r"\boxed{1.8}", 0, 0),
        (r"\boxed{1,8}", 0, 0),
        (r"\boxed{18,000}", 0, 0),
        (r"\boxed{18{,}000}", 0, 0),
        (r"\boxed{18 or 19}", 0, 0),
        (r"\boxed{17 or 18}", 0, 1),
        (r"\boxed{20 - 2 = 18}", 0, 1),
        (r"\boxed{\frac{36}{2}}", 0, 0),
        (r"\boxed{\frac{1}{18}}", 0, 1),
        (r"\boxed{18^2}", 0, 0),
        (r"\boxed{eighteen}", 0, 0),
        (r"18 \boxed{none}", 0, 1),
    ],
)
def test_reward_as_a_person_would(completion, reward, lenient):
    assert score(completion, GOLD) == {"reward": reward, "lenient": lenient}


@pytest.mark.parametrize(
    "answer, right, wrong",
    [
        ("-7", ["-7", "−7", r"\$-7", "-7.0"], ["7", "--", "3-7", "0"]),
        (
            "1,234",
            ["1,234", "1234", "1{,}234", r"1\,234", r"\$1,234.00"],
            ["1,2345", "1 234", "234", "1.234"],
        ),
        ("192000000", ["192,000,000", "192000000"], ["192", "192,000"]),
        ("1", ["1", "1.0"], [r"\frac{1}{2}", r"\frac{2}{1}", "1/2", "10", "one"]),
        ("0", ["0", "0.00"], ["", "none", "10"]),
    ],
)
def test_other_answers(answer, right, wrong):
    for content in right + wrong:
        assert score(rf"\boxed{{{content}}}", rf"\boxed{{{answer}}}")["reward"] == (content in right), content


@pytest.mark.parametrize("answer", ["none", "yes, as 3 + 4 = 7 \\boxed{yes}", r"\boxed{3/4}", "3/4"])
def test_an_answer_that_is_not_one_number_is_an_error(answer):
    """Or a wrong completion would match a part of it, and one without a number the lack of one."""
    with pytest.raises(ValueError):
        score(r"\boxed{none}", answer)


def test_an_answer_may_be_just_the_number():
    assert score(r"\boxed{1234}", "1,234") == {"reward": 1, "lenient": 1}
    assert score(r"\boxed{7}", r"3 + 4 = 7. The answer is \boxed{7}.") == {"reward": 1, "lenient": 1}


def test_solutions_end_in_a_box(tmp_path):
    row = {"question": "A?", "answer": "3+4=<<3+4=7>>7 and 7*2=<<7*2=14>>14.\nSo 14.\n#### -1,400"}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    solution = "3+4=7 and 7*2=14.\nSo 14.\nThe answer is \\boxed{-1,400}."
    assert load_gsm8k(str(tmp_path), "train") == [("A?", solution)]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real GSM8K is not part of the project")
@pytest.mark.parametrize("split, count", [("train", 7473), ("test", 1319)])
def test_every_real_solution_is_right(split, count):
    rows = [json.loads(line) for line in open(REAL / f"{split}.jsonl")]
    loaded = load_gsm8k(str(REAL), split)
    assert len(rows) == len(loaded) == count
    for row, (problem, solution) in zip(rows, loaded):
        gold = row["answer"].split("#### ")[1]
        assert problem == row["question"] and solution.endswith(f"\nThe answer is \\boxed{{{gold}}}.")
        assert numbers(solution)[-1] == int(gold.replace(",", ""))
        assert score(solution, solution) == {"reward": 1, "lenient": 1}
        assert not re.search("<<|>>|####", solution)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real GSM8K is not part of the project")
def test_real_problems_run(main):
    g = main(f"gsm8k_grpo.py --dataset {REAL} --steps 1 {QUICK}")
    assert len(g["TRAIN"]) == 7473 and len(g["TEST"]) == 4 and len(g["history"]) == 1


def test_grpo_in_the_loop(main, updates):
    """The last update's gradient against one of our own, from one pass over the whole batch without micro-batches."""
    g = main(f"gsm8k_grpo.py --steps 2 --lr 0 --update-epochs 2 --beta 0.3 {QUICK} --batch-size 5")
    rewards = [score(text, answer)["reward"] for text, answer in zip(g["texts"], g["answers"])]
    assert g["rewards"].tolist() == rewards and g["prompts"][:4] == (g["prompts"][0],) * 4
    logp = g["completion_logp"](g["model"], g["ids"], g["attn"], g["mask"])
    advantages = g["group_advantages"](torch.tensor(rewards), 4)
    loss = -(advantages * torch.exp(logp - logp.detach()) * g["mask"]).sum() / g["mask"].sum()  # lr 0: no KL
    ours = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(g["model"].parameters()))])
    ours *= min(1.0, 1 / ours.double().norm().item())
    assert (ours - updates[-1]).abs().max() < 1e-5
    assert g["history"][-1]["kl"] == pytest.approx(0, abs=1e-6)


@BOTH
def test_old_and_reference_log_probs_are_those_of_before(main, tiny, updates, script):
    """Of each micro-batch, in the first update, where they have no gradient, and in the second, which moves away from them."""
    flags = "--micro-batch-size 3 --update-epochs 2 --epsilon 0.001 --beta 0.04"
    flags += " --sft-steps 0" * (script == "gsm8k_sft_grpo")
    g = main(f"{script}.py --steps 1 {QUICK} {flags}")
    model, _ = tiny("qwen")
    before = g["completion_logp"](model, g["ids"], g["attn"], g["mask"])
    for name in ("old_logp", "ref_logp"):
        assert (g[name] - before).abs().max() < 1e-3 and not g[name].requires_grad
    loss = -(g["advantages"] * before * g["mask"]).sum() / g["mask"].sum()  # each ratio is 1, and the KL 0
    ours = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))])
    ours *= min(1.0, 1 / ours.double().norm().item())
    assert (ours - updates[0]).abs().max() < 1e-5
    assert g["history"][0]["clip_frac"] > 0.05 and g["history"][0]["kl"] > 0


@BOTH
def test_a_batch_that_teaches_nothing_is_a_step(main, script):
    g = main(f"{script}.py --steps 2 --batch-size 2 --group-size 2 --max-new-tokens 1 --eval-size 2")
    assert [record["zero_std"] for record in g["history"][-2:]] == [1, 1]
    assert [record["reward"] for record in g["history"][-2:]] == [0, 0]


def test_evaluation(main, tiny, tmp_path, capsys):
    """Counted again here, one by one and without score."""
    flags = "--steps 1 --batch-size 1 --group-size 2 --max-new-tokens 64 --eval-size 70"
    g = main(f"gsm8k_grpo.py {flags} --log {tmp_path / 'log'}")
    model, tokenizer = tiny("qwen")
    boxed = last = 0
    for question, solution in g["TEST"]:
        (text,), *_ = g["sample"](model, tokenizer, [question], 64, greedy=True)
        answer = re.findall(r"\d+", solution)[-1]
        boxed += re.findall(r"\\boxed\{(.*?)\}", text)[-1:] == [answer]
        last += re.findall(r"\d+", text)[-1:] == [answer]
    first = json.loads((tmp_path / "log").read_text().splitlines()[0])
    numbers = {"n": 70, "reward": pytest.approx(boxed / 70), "lenient": pytest.approx(last / 70)}
    assert first == {"step": 0, "eval": numbers} and 0 < boxed < last
    out = capsys.readouterr().out
    assert f"\nafter 0 steps, greedy, 70 prompts: reward {boxed / 70:.4g}  lenient {last / 70:.4g}\n" in out
    assert f"    {question!r} -> {text!r}\n" in out


def test_sft_then_grpo(main, tiny, monkeypatch, tmp_path):
    """Targets without the calculator's marks and with an end; the reference is the model after SFT; a fresh optimizer."""
    seen, call = [], PreTrainedTokenizerFast.__call__

    def watched(self, text, **kwargs):
        seen.append(text)
        return call(self, text, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", watched)
    flags = f"--lr 2e-6 --sft-lr 3e-6 --update-epochs 2 --beta 0.04 --log {tmp_path / 'log'}"
    g = main(f"gsm8k_sft_grpo.py --steps 1 --sft-steps 3 {QUICK} {flags}")
    targets = [
        text for batch in seen if isinstance(batch, list) for text in batch if text.endswith("}.<|im_end|>")
    ]
    solutions = {solution + "<|im_end|>" for _, solution in g["TRAIN"]}
    assert len(targets) == 3 * 2 and set(targets) <= solutions
    models = [dict(model.named_parameters()) for model in (tiny("qwen")[0], g["reference"], g["model"])]
    for name in [name for name, p in models[0].items() if p.dim() == 2]:
        start, after_sft, after_grpo = (parameters[name] for parameters in models)
        # SFT moved each weight by 1/5 + 2/5 + 1/3 of its rate at most, GRPO's two updates by 1/5 of theirs each
        assert 0 < (after_sft - start).abs().max() < 4e-6 and 0 < (after_grpo - after_sft).abs().max() < 2e-6
    assert g["optimizer"].state[next(g["model"].parameters())]["step"] == 2
    phases = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [x["phase"] for x in phases if "eval" in x] == ["base", "sft", "grpo"]
    assert gsm8k_sft_grpo.SYSTEM == gsm8k_grpo.SYSTEM


def test_without_sft_there_is_no_evaluation_after_it(main, tmp_path):
    main(f"gsm8k_sft_grpo.py --steps 1 --sft-steps 0 {QUICK} --log {tmp_path / 'log'}")
    phases = [json.loads(line)["phase"] for line in (tmp_path / "log").read_text().splitlines()]
    assert phases == ["base", "grpo", "grpo"]


@BOTH
def test_evaluation_during_training(main, tmp_path, script):
    """After every two steps, and the model is saved each time; not twice after the last step."""
    saved, save = [], Qwen2ForCausalLM.save_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Qwen2ForCausalLM, "save_pretrained", lambda self, path: (saved.append(path), save(self, path))
        )
        flags = f"--steps 4 --eval-every 2 {QUICK} --max-new-tokens 4 --save {tmp_path / 'out'} --log {tmp_path / 'log'}"
        g = main(f"{script}.py {flags}")
    evaluated = [r["step"] for r in map(json.loads, (tmp_path / "log").open()) if "eval" in r]
    assert evaluated == ([0, 8, 10, 12] if script == "gsm8k_sft_grpo" else [0, 2, 4])
    assert saved == [str(tmp_path / "out")] * 2 and len(g["history"]) == evaluated[-1]


@BOTH
@pytest.mark.parametrize("size", [0, -1])
def test_no_evaluation(main, tmp_path, capsys, script, size):
    g = main(f"{script}.py --steps 1 {QUICK} --max-new-tokens 4 --eval-size {size} --log {tmp_path / 'log'}")
    assert g["history"][-1]["tokens"] and "after" not in capsys.readouterr().out
    assert "eval" not in (tmp_path / "log").read_text()


def test_a_copy_of_the_hubs_folder(tmp_path):
    """The Hub's data set has two configurations, one folder each: main is read, and socratic is not."""
    for config in ("main", "socratic"):
        (tmp_path / config).mkdir()
        for split in ("train", "test"):
            row = {"question": config, "answer": "So 14.\n#### 14"}
            (tmp_path / config / f"{split}-00000-of-00001.jsonl").write_text(json.dumps(row) + "\n")
    assert load_gsm8k(str(tmp_path), "train") == [("main", "So 14.\nThe answer is \\boxed{14}.")]


def test_an_answer_without_its_mark_is_an_error(tmp_path):
    """Or the last number of the text would silently be the gold answer."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"question": "A?", "answer": "It is 14, not 15."}\n')
    with pytest.raises(ValueError):
        load_gsm8k(str(tmp_path), "train")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ""),
        ("no box, but {18}", ""),
        (r"\boxed{18}", "18"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\text{\textbf{20}} eggs} and }", r"\text{\textbf{20}} eggs"),
        (r"\boxed{18", ""),
        (r"\boxed{1} then \boxed{{2}", ""),
        (r"\boxed{}", ""),
    ],
)
def test_last_box(text, expected):
    assert gsm8k_grpo.last_box(text) == expected

"""The bundled models and data are what the scripts need: able, but not yet in the wanted form.

Catches a checkpoint that already knows the format (nothing to learn), one that never tries it (nothing to learn from), wrong
facts in the data, and a tokenizer that lost a trait of the real ones.
"""

import json
import re

import make_tiny
import minimal_grpo
import pytest
import torch
from conftest import ROOT

DATA = {
    split: [json.loads(line) for line in open(ROOT / f"tests/tiny-gsm8k/{split}.jsonl")]
    for split in ("train", "test")
}
WORDS = 40
# Topics for evaluation: those the lexical scripts do not train on.
TOPICS = ["winter", "music", "rivers", "the moon", "chess", "silence"]


def right(text, answer):
    found = re.search(r"#### (\d+)$", text)
    return bool(found) and found[1] == answer


def sampled(model, tokenizer, prompts, limit, check):
    """Greedy accuracy, and the share of prompts with a right answer among 8 samples."""
    torch.manual_seed(0)
    greedy, *_ = minimal_grpo.sample(model, tokenizer, prompts, limit, greedy=True)
    found = [False] * len(prompts)
    for _ in range(8):
        texts, *_ = minimal_grpo.sample(model, tokenizer, prompts, limit)
        found = [f or check(i, text) for i, (f, text) in enumerate(zip(found, texts))]
    return sum(check(i, text) for i, text in enumerate(greedy)) / len(prompts), sum(found) / len(prompts)


def test_qwen_on_sums(tiny):
    prompts, answers = zip(*minimal_grpo.TEST)
    greedy, best_of_8 = sampled(
        *tiny("qwen"), prompts, 48, lambda i, text: minimal_grpo.score(text, answers[i])["reward"] == 1
    )
    assert 0.05 <= greedy <= 0.40
    assert best_of_8 >= 0.85


def test_qwen_on_word_problems(tiny, monkeypatch):
    monkeypatch.setattr(minimal_grpo, "SYSTEM", make_tiny.GSM8K_SYSTEM)
    prompts = [row["question"] for row in DATA["test"]]
    answers = [row["answer"].split("#### ")[1] for row in DATA["test"]]
    greedy, best_of_8 = sampled(*tiny("qwen"), prompts, 96, lambda i, text: right(text, answers[i]))
    assert 0.10 <= greedy <= 0.50
    assert best_of_8 >= 0.70


def test_llama_on_topics(tiny, monkeypatch):
    monkeypatch.setattr(minimal_grpo, "SYSTEM", make_tiny.TEXT_SYSTEM)
    prompts = [f"Write about {WORDS} words about {topic}." for topic in TOPICS]
    for greedy, repeat in ((True, 1), (False, 10)):
        torch.manual_seed(0)
        texts, *_ = minimal_grpo.sample(*tiny("llama"), prompts * repeat, 96, greedy=greedy)
        words = [re.findall("[a-z]+", text.lower()) for text in texts]
        assert 0.45 <= sum(len(set(w)) / len(w) for w in words) / len(words) <= 0.65, f"greedy={greedy}"
        assert 0.9 * WORDS <= sum(map(len, words)) / len(words) <= 1.1 * WORDS


def test_traits_of_the_real_ones(tiny):
    qwen, qwen_tokenizer = tiny("qwen")
    llama, _ = tiny("llama")
    stored = {
        name: make_tiny.PreTrainedTokenizerFast.from_pretrained(ROOT / f"tests/tiny-{name}")
        for name in ("qwen", "llama")
    }
    assert 0.5e6 < qwen.num_parameters() < 1.5e6 and 0.5e6 < llama.num_parameters() < 1.5e6
    ends = qwen_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert qwen.generation_config.eos_token_id == ends and qwen_tokenizer.eos_token_id == ends[0]
    assert len(set(llama.generation_config.eos_token_id)) == 3 and stored["llama"].pad_token is None
    assert "strftime_now" in stored["llama"].chat_template
    for tokenizer in stored.values():
        ids = tokenizer("1234", add_special_tokens=False)["input_ids"]
        assert [tokenizer.decode([i]) for i in ids] == list("1234")
        assert (
            tokenizer.decode(tokenizer("Naïve, 東京!")["input_ids"], skip_special_tokens=True)
            == "Naïve, 東京!"
        )
    for name in ("qwen", "llama"):
        files = list((ROOT / f"tests/tiny-{name}").iterdir())
        assert sum(file.stat().st_size for file in files) < 3e6
        config = json.loads((ROOT / f"tests/tiny-{name}/config.json").read_text())
        assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


@pytest.mark.parametrize("split, least", [("train", 600), ("test", 200)])
def test_word_problems_are_right(split, least):
    assert len(DATA[split]) >= least
    for row in DATA[split]:
        assert row.keys() == {"question", "answer"}
        *steps, last = row["answer"].split("\n")
        marks = [re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)", step) for step in steps]
        for ((a, op, b, c, shown),) in marks:  # exactly one a step
            assert (
                {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op] == int(c) == int(shown)
            )
        assert last == f"#### {marks[-1][0][3]}"


def test_no_problem_in_both_splits():
    questions = [row["question"] for split in DATA.values() for row in split]
    assert len(set(questions)) == len(questions)


def test_the_prompts_are_those_of_the_scripts():
    assert make_tiny.SUM_SYSTEM == minimal_grpo.SYSTEM

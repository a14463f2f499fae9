"""The bundled models and data are what the scripts need: able, but not yet in the wanted form.

Catches a checkpoint that already knows the format (nothing to learn), one that never tries it (nothing to learn from), wrong
facts in the data, and a tokenizer that lost a trait of the real ones.
"""

import json
import random
import re

import gsm8k_grpo
import gsm8k_sft_grpo
import make_tiny
import minimal_dpo
import minimal_grpo
import minimal_ppo
import minimal_sft
import pytest
import reinforce
import rloo
import torch
from conftest import ROOT

DATA = {
    split: [json.loads(line) for line in open(ROOT / f"tests/tiny-gsm8k/{split}.jsonl")]
    for split in ("train", "test")
}


def best_of_8(model, tokenizer, prompts, limit, right):
    """The share of all samples that are right, and that of the prompts with a right one among eight."""
    torch.manual_seed(0)
    found = []
    for _ in range(8):
        texts, *_ = minimal_grpo.sample(model, tokenizer, prompts, limit)
        found.append([right(i, text) for i, text in enumerate(texts)])
    found = torch.tensor(found).double()
    return found.mean().item(), found.amax(0).mean().item()


def test_qwen_on_sums(tiny):
    prompts, answers = zip(*minimal_grpo.TEST)
    sampled, best = best_of_8(
        *tiny("qwen"), prompts, 48, lambda i, text: minimal_grpo.score(text, answers[i])["reward"]
    )
    assert 0.05 <= sampled <= 0.45 and best >= 0.60


def test_qwen_on_word_problems(tiny, monkeypatch):
    monkeypatch.setattr(minimal_grpo, "SYSTEM", make_tiny.GSM8K_SYSTEM)
    prompts = [row["question"] for row in DATA["test"][:100]]
    boxes = ["\\boxed{" + row["answer"].split("#### ")[1] + "}" for row in DATA["test"][:100]]
    model, tokenizer = tiny("qwen")
    texts, *_ = minimal_grpo.sample(model, tokenizer, prompts, 96, greedy=True)
    assert 0.10 <= sum(box in text for box, text in zip(boxes, texts)) / len(texts) <= 0.50
    _, best = best_of_8(model, tokenizer, prompts, 96, lambda i, text: boxes[i] in text)
    assert best >= 0.70


def test_llama_on_topics(tiny):
    """Texts as long as is asked for, with words to spare."""
    torch.manual_seed(0)
    texts, *_ = reinforce.sample(*tiny("llama"), [prompt for prompt, _ in reinforce.TEST] * 3, 96)
    words = [re.findall("[a-z]+", text.lower()) for text in texts]
    # 0.64 over many draws, with a standard error of 0.02 for these 72 texts
    assert 0.57 <= sum(len(set(w[:40])) / len(w[:40]) for w in words) / len(words) <= 0.71
    assert 36 <= sum(map(len, words)) / len(words) <= 44


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
    """Each system prompt, sum and request that a script makes is one that the models were trained on; no problem of a test is."""
    assert {m.SYSTEM for m in (minimal_sft, minimal_dpo, minimal_grpo, minimal_ppo)} == {make_tiny.SUM_SYSTEM}
    assert {m.SYSTEM for m in (gsm8k_grpo, gsm8k_sft_grpo)} == {make_tiny.GSM8K_SYSTEM}
    assert {m.SYSTEM for m in (reinforce, rloo)} == {make_tiny.TEXT_SYSTEM}
    rng, held_out = random.Random(0), {row["question"] for row in DATA["test"]}

    def asked(maker, count, *more):
        chats = [maker(rng, *more) for _ in range(count)]
        return {(messages[0]["content"], messages[1]["content"]) for messages, _ in chats}

    assert asked(make_tiny.sum_chat, 3000) == {
        (minimal_grpo.SYSTEM, prompt) for prompt, _ in minimal_grpo.TRAIN
    }
    texts = asked(make_tiny.text_chat, 3000)
    assert {(reinforce.SYSTEM, prompt) for prompt in reinforce.PROMPTS + rloo.PROMPTS} <= texts
    problems = asked(make_tiny.problem_chat, 3000, held_out)
    assert {system for system, _ in problems} == {gsm8k_grpo.SYSTEM} and not held_out & {
        p for _, p in problems
    }

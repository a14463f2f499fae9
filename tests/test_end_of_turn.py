"""The end of a turn: what SFT and DPO train is what the chat template writes, and sampling stops at it. Catches a model that is taught an end
at which nothing stops, because its tokenizer or its generation config names another token.
"""

import importlib
from pathlib import Path

import minimal_grpo
import minimal_sft
import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

ENDS = {  # as their model cards say
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "lfm2": "<|im_end|>",
}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '# ' + m['role'] + '\n' + m['content'] + '\n\n' }}{% endfor %}{{ '# End' }}"
)


def tokenizer_with(template, **special):
    """tiny-qwen's tokenizer with these families' end tokens, and a template."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/tiny-qwen", padding_side="left")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens(sorted(set(ENDS.values())), special_tokens=True)
    tokenizer.chat_template = template
    for name, token in special.items():
        setattr(tokenizer, name, token)
    return tokenizer


@pytest.mark.parametrize("name", ENDS)
def test_the_templates_end(name):
    """The templates are those that TRL keeps to recognize a family by."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    tokenizer = tokenizer_with((folder / f"{name}.jinja").read_text(), eos_token="<|endoftext|>")
    assert minimal_sft.end_of_turn(tokenizer) == ENDS[name]


def test_smollm2_and_the_bundled_ones():
    assert minimal_sft.end_of_turn(tokenizer_with(SMOLLM2)) == "<|im_end|>"
    for name, end in {"qwen": "<|im_end|>", "llama": "<|eot_id|>"}.items():
        assert minimal_sft.end_of_turn(AutoTokenizer.from_pretrained(ROOT / f"tests/tiny-{name}")) == end


def test_a_template_that_writes_no_end():
    """Then the tokenizer's own is all there is."""
    assert minimal_sft.end_of_turn(tokenizer_with(NO_END, eos_token="<|endoftext|>")) == "<|endoftext|>"


@pytest.fixture
def other_eos(tiny, tmp_path):
    """A model folder whose tokenizer and generation config know <|endoftext|> only, as if its template were another's."""
    model, tokenizer = tiny("qwen")
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("script", ["minimal_sft", "minimal_dpo", "gsm8k_sft_grpo"])
def test_the_templates_end_is_trained(other_eos, script):
    module = importlib.import_module(script)
    tokenizer = AutoTokenizer.from_pretrained(other_eos, padding_side="left")
    ids, attn, mask = module.encode_completions(tokenizer, ["Hi", "Hi"], ["18", "<answer>18</answer>"])
    C = mask.shape[1]
    for row, kept in zip(ids[:, -C:], mask):
        assert (
            tokenizer.decode(row[kept == 1]).endswith("<|im_end|>")
            and int(row[kept == 1][-1]) != tokenizer.eos_token_id
        )


def test_sft_learns_to_stop(main, other_eos):
    """Accuracy counts what comes after the answer as well, so a model that never stops is wrong."""
    g = main(f"minimal_sft.py --model {other_eos}")
    texts, *_, finished = g["sample"](g["model"], g["tokenizer"], ["What is 3 + 8?"] * 50, 48)
    assert finished.all() and sum(text == "<answer>11</answer>" for text in texts) >= 45


@pytest.mark.parametrize("named", [None, 0, 5, [5, 7]], ids=str)
def test_sampling_stops_at_the_templates_end_and_at_the_named_ones(tiny, monkeypatch, named):
    """Also if the generation config names another token, token 0, several, or nothing."""
    model, tokenizer = tiny("qwen")
    model.generation_config.eos_token_id = named
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    others = named if isinstance(named, list) else [named] if named is not None else []
    for stop in [end, *others]:
        draws = iter([9, stop, 9, 9])
        monkeypatch.setattr(torch, "multinomial", lambda probs, n: torch.full((len(probs), n), next(draws)))
        _, ids, attn, mask, finished = minimal_grpo.sample(model, tokenizer, ["Hi"], 4)
        assert mask.tolist() == [[1.0, 1.0]] and finished.tolist() == [True]
    draws = iter([9, 8, 10, 11])
    monkeypatch.setattr(torch, "multinomial", lambda probs, n: torch.full((len(probs), n), next(draws)))
    *_, mask, finished = minimal_grpo.sample(model, tokenizer, ["Hi"], 4)
    assert mask.shape == (1, 4) and not finished.any()


def test_a_tokenizer_without_eos_and_pad(main, tiny, tmp_path):
    model, tokenizer = tiny("qwen")
    tokenizer.eos_token = tokenizer.pad_token = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    for script in ("minimal_sft", "minimal_grpo"):
        g = main(f"{script}.py --model {tmp_path / 'model'} --steps 1 --batch-size 2")
        assert len(g["history"]) == 1 and g["tokenizer"].pad_token == "<|im_end|>"

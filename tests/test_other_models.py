"""Two steps of each RL script on random models of other kinds: catches what holds only for the bundled two, such as one name for the
end-of-turn id, a pad token of its own, or a tied head.
"""

import pytest
import torch
from conftest import PRESENT, ROOT
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
KINDS = {  # model class, config class, config, end-of-turn ids, pad token
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}, "two", "own"),
    "llama": (LlamaForCausalLM, LlamaConfig, {}, "two", None),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"query_pre_attn_scalar": 16, "sliding_window": 16},
        "one",
        "own",
    ),
    "one end, pad is eos": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}, "one", "eos"),
}
RL = [name for name in PRESENT if name not in ("minimal_sft", "minimal_dpo")]


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps(main, tmp_path, kind):
    make, config, more, ends, pad = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/tiny-qwen")
    eos = tokenizer.eos_token_id
    torch.manual_seed(0)
    special = {"eos_token_id": eos, "pad_token_id": None, "bos_token_id": None}
    model = make(config(vocab_size=len(tokenizer), **SMALL, **more, **special))
    model.generation_config.eos_token_id = eos if ends == "one" else [eos, 7]
    tokenizer.pad_token = {"own": tokenizer.pad_token, "eos": tokenizer.eos_token, None: None}[pad]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    for script in RL:
        short = " --eval-size 2" if script.startswith("gsm8k") else ""
        flags = f"--model {tmp_path / 'model'} --steps 2 --batch-size 2 --max-new-tokens 6 --lr 1e-3{short}"
        g = main(f"{script}.py {flags}")
        assert len(g["history"]) == 2 and type(g["model"]) is make and g["mask"].sum() >= len(g["mask"])
        assert all(torch.isfinite(p).all() for p in g["model"].parameters())

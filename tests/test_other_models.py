"""Random models of other kinds: catches what holds only for the bundled two, such as one name for the end-of-turn id, a pad token of
its own, a tied head, or a cache of keys and values where a model keeps another state.
"""

import minimal_grpo
import pytest
import torch
import transformers
from conftest import PRESENT, ROOT
from transformers import AutoTokenizer

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 16}
DELTA = {  # attention that is linear in three layers of four
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
# name: model class, config class, config. Those that the installed transformers does not have are left out.
KINDS = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        GEMMA | {"num_hidden_layers": 6, "vocab_size_per_layer_input": 1024},
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", {"partial_rotary_factor": 0.5}),  # its lm_head has a bias
    "qwen3-next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", DELTA | EXPERTS),
    "qwen3.5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", DELTA),
}
KINDS = {name: kind for name, kind in KINDS.items() if hasattr(transformers, kind[0])}
if (
    transformers.__version__ < "5"
):  # its LFM2 sees left padding: log-probs move by 1e-3 with it, in float64, too
    KINDS.pop("lfm2", None)
PROMPTS = [
    "What is 3 + 8?",
    "Hi",
    "Write about 40 words about winter.",
    "",
    "Tom has 3 apples. How many?",
] * 3
RL = [name for name in PRESENT if name not in ("minimal_sft", "minimal_dpo")]


def random_model(kind, ends, pad, **more):
    """A model with random weights and tiny-qwen's tokenizer: with one or two end-of-turn ids, and pad as named."""
    model_class, config_class, config = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/tiny-qwen", padding_side="left")
    eos = tokenizer.eos_token_id
    special = {"eos_token_id": eos, "pad_token_id": None, "bos_token_id": None}
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(vocab_size=len(tokenizer), **SMALL | config | special | more)
    model = getattr(transformers, model_class)(config).eval()
    model.generation_config.eos_token_id = eos if ends == "one" else [eos, 7]
    tokenizer.pad_token = {"own": tokenizer.pad_token, "eos": tokenizer.eos_token, None: None}[pad]
    return model, tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_is_trained(monkeypatch, kind):
    """The log-prob of a token when it was drawn is its log-prob in the loss, and that of the row alone, without padding or cache."""
    model, tokenizer = random_model(kind, "two", "own")
    with torch.no_grad():
        for p in model.parameters():  # away from the near-uniform distribution of a fresh model
            p.mul_(3.0 if p.dim() == 2 else 1.0)
    drawn, multinomial = [], torch.multinomial

    def watched(probs, *args, **kwargs):
        tokens = multinomial(probs, *args, **kwargs)
        drawn.append(probs.gather(1, tokens).log())
        return tokens

    monkeypatch.setattr(torch, "multinomial", watched)
    texts, ids, attn, mask, finished = minimal_grpo.sample(model, tokenizer, PROMPTS, 40)
    trained = minimal_grpo.completion_logp(model, ids, attn, mask)
    assert trained.requires_grad and ((trained - torch.cat(drawn, 1)) * mask).abs().max() < 1e-4
    assert (trained * mask).std() > 0.2, "a distribution worth testing"
    assert len(set(attn.sum(1).tolist())) > 1
    with torch.no_grad():
        for i in range(len(PROMPTS)):
            row, n = ids[i][attn[i] == 1], int(mask[i].sum())
            alone = model(row[None]).logits[0, -n - 1 : -1].log_softmax(-1).gather(1, row[-n:, None])[:, 0]
            assert (trained[i, :n] - alone).abs().max() < 1e-4


@pytest.mark.parametrize(
    "kind, ends, pad, more",
    [
        ("qwen3", "two", "own", {}),
        ("llama", "two", None, {}),
        ("gemma3", "one", "own", {}),
        ("llama", "one", "eos", {"tie_word_embeddings": True}),
        ("phi", "one", "own", {}),
    ],
)
def test_two_steps(main, tmp_path, kind, ends, pad, more):
    for part in random_model(kind, ends, pad, **more):
        part.save_pretrained(tmp_path / "model")
    for script in RL:
        short = " --eval-size 2" if script.startswith("gsm8k") else ""
        flags = f"--model {tmp_path / 'model'} --steps 2 --batch-size 2 --max-new-tokens 6 --lr 1e-3{short}"
        g = main(f"{script}.py {flags}")
        sft = 8 if script == "gsm8k_sft_grpo" else 0  # steps of its first phase
        assert len(g["history"]) == sft + 2 and type(g["model"]).__name__ == KINDS[kind][0]
        assert g["mask"].sum() >= len(g["mask"])
        assert all(torch.isfinite(p).all() for p in g["model"].parameters())
        if script == "minimal_ppo":
            assert [name for name, _ in g["critic"].lm_head.named_parameters()] == ["weight"]

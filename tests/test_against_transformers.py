"""Our sampler against model.generate and against the model's own softmax: catches a wrong cache, position, mask or stop, and a draw
that is not from the distribution it claims.
"""

import minimal_grpo
import pytest
import torch
from transformers import GenerationConfig

PROMPTS = [
    "What is 3 + 8?",
    "Hi",
    "Write about 40 words about winter.",
    "",
    "Tom has 3 apples. Ann gives Tom 4 more. How many?",
]


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_greedy_is_generate(tiny, name):
    """Token for token, on prompts of mixed lengths; the checkpoint's sampling options (top_k, repetition_penalty) are reset."""
    model, tokenizer = tiny(name)
    texts, ids, attn, mask, finished = minimal_grpo.sample(model, tokenizer, PROMPTS, 60, greedy=True)
    P = ids.shape[1] - mask.shape[1]
    ends = model.generation_config.eos_token_id
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=60, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.generation_config = plain  # generate() fills what a config leaves open from the model's
    theirs = model.generate(ids[:, :P], attention_mask=attn[:, :P], generation_config=plain)
    assert theirs.shape == ids.shape and (mask.sum(1) < 60).any() and len(set(mask.sum(1).tolist())) > 1
    assert torch.equal(torch.where(mask == 1, ids[:, P:], -1), torch.where(mask == 1, theirs[:, P:], -1))


class Wide:
    """The model asked once, its answer given to every row: 20,000 draws at the price of one."""

    def __init__(self, model):
        self.model, self.generation_config = model, model.generation_config

    def __call__(self, tokens, attention_mask, **kwargs):
        assert (tokens == tokens[:1]).all() and (attention_mask == attention_mask[:1]).all()
        out = self.model(tokens[:1], attention_mask=attention_mask[:1], **kwargs)
        out.logits = out.logits.expand(len(tokens), -1, -1)
        return out


@pytest.mark.parametrize(
    "name, prompt", [("qwen", "What is 3 + 8?"), ("llama", "Write about 40 words about chess.")]
)
def test_draws_fit_the_softmax(tiny, name, prompt):
    """Chi-square over the tokens expected at least five times in 20,000 draws, the others as one."""
    model, tokenizer = tiny(name)
    torch.manual_seed(0)
    _, ids, attn, mask, _ = minimal_grpo.sample(Wide(model), tokenizer, [prompt] * 20_000, 1)
    assert mask.shape == (20_000, 1)
    with torch.no_grad():
        expected = 20_000 * model(ids[:1, :-1]).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(ids[:, -1], minlength=len(expected)).double()
    common = expected >= 5
    assert 2 <= common.sum() and abs(expected[common].max()) < 19_900, "a distribution worth testing"
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    p_value = torch.special.gammaincc(
        (len(wanted) - 1) / torch.tensor(2.0, dtype=torch.double), statistic / 2
    )
    assert p_value > 1e-3

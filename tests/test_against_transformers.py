"""Our sampler against model.generate and against the model's own softmax: catches a wrong cache, position, mask or stop, and a draw
that is not from the distribution it claims.
"""

from types import SimpleNamespace

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


class Known:
    """A model whose next token has the same known distribution everywhere."""

    def __init__(self, model):
        self.config, self.generation_config = model.config, model.generation_config
        self.logits = 2 * torch.randn(model.config.vocab_size)

    def __call__(self, tokens, *args, **kwargs):
        return SimpleNamespace(logits=self.logits.expand(len(tokens), 1, -1))


def test_draws_fit_the_softmax(tiny):
    """Chi-square over the tokens expected at least five times in 10,000 draws, the others as one."""
    model, tokenizer = tiny("qwen")
    torch.manual_seed(0)
    known = Known(model)
    _, ids, _, mask, _ = minimal_grpo.sample(known, tokenizer, ["Hi"] * 10_000, 1)
    assert mask.shape == (10_000, 1)
    powers = known.logits.double().exp()
    expected = 10_000 * powers / powers.sum()
    counts = torch.bincount(ids[:, -1], minlength=len(expected)).double()
    common = expected >= 5
    assert common.sum() > 100 and (~common).sum() > 100, "a distribution worth testing"
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    degrees = torch.tensor(len(wanted) - 1.0).double()
    assert torch.special.gammaincc(degrees / 2, statistic / 2) > 1e-3  # the p-value

"""Runs one of the scripts with less work for a CPU: what all prompts of a batch begin with is read once.

    uv run tests/real/shared_prompt.py minimal_ppo.py --model FOLDER --log LOG.jsonl

The script is unchanged; only the model's forward pass is another one, with the same logits. The columns after the longest
completion of a micro-batch are left out as well. For Qwen2 models. tests/test_shared_prompt.py compares it with the plain script.
"""

import runpy
import sys

import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

plain_forward = Qwen2ForCausalLM.forward


def forward(self, ids, attention_mask, position_ids=None, past_key_values=None, *, use_cache, logits_to_keep):
    """Takes what the scripts pass: ids and attention_mask (N, T)."""
    if past_key_values is not None and past_key_values.get_seq_length():  # while sampling, after the prompts
        return plain_forward(
            self, ids, attention_mask, None, past_key_values, use_cache=True, logits_to_keep=logits_to_keep
        )
    width = ids.shape[1]
    used = attention_mask.any(0).nonzero().max().item() + 1
    unused = width - used  # columns that are padding in every row
    ids, attention_mask, keep = ids[:, :used], attention_mask[:, :used], logits_to_keep - unused
    same = (ids == ids[:1]).all(0) & (attention_mask == 1).all(0)
    shared = min(same.long().cumprod(0).sum().item(), used - keep)
    cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
    if shared:
        beginning = DynamicCache(config=self.config)
        self.model(ids[:1, :shared], None, None, beginning, use_cache=True)  # by position, as in the scripts
        for i, layer in enumerate(beginning.layers):
            keys, values = (t.expand(len(ids), -1, -1, -1) for t in (layer.keys, layer.values))
            cache.update(keys, values, i)  # gradients flow back through it
    out = plain_forward(
        self, ids[:, shared:], attention_mask, None, cache, use_cache=True, logits_to_keep=keep
    )
    out.logits = F.pad(out.logits, (0, 0, 0, unused))
    return out


if __name__ == "__main__":
    Qwen2ForCausalLM.forward = forward
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")

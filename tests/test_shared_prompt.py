"""tests/real/shared_prompt.py against the plain forward pass: the logs it made are worth what this agreement is worth.

Catches a beginning that is shared though a row differs or is padded there, a lost gradient of it, columns cut off that a row uses,
and a sampler that starts from other keys and values.
"""

import importlib.util

import minimal_ppo as script
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

spec = importlib.util.spec_from_file_location("shared_prompt", ROOT / "tests/real/shared_prompt.py")
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)


@pytest.fixture
def lengths(monkeypatch):
    """Switches the forward pass; the list of how many columns each pass of the whole batch reads."""
    columns, plain = [], shared.plain_forward

    def watched(self, ids, *args, **kwargs):
        columns.append(ids.shape[1])
        return plain(self, ids, *args, **kwargs)

    monkeypatch.setattr(shared, "plain_forward", watched)
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", shared.forward)
    return columns


@pytest.mark.parametrize("prompts", [["What is 3 + 4?", "What is 9 + 1?"], ["What is 3 + 4?", "Why?"]])
def test_gradients_and_draws(tiny, request, prompts):
    """Two prompts with one beginning; two of which one is padded on the left, so that nothing is shared."""
    model, tokenizer = tiny("qwen")
    critic = tiny("qwen")[0]
    critic.lm_head = torch.nn.Linear(critic.lm_head.in_features, 1, bias=False)
    prompts = [prompt for prompt in prompts for _ in range(4)]
    found = []
    for columns in ([], None):
        if columns is None:
            columns = request.getfixturevalue("lengths")
        torch.manual_seed(0)
        texts, *batch, _ = script.sample(model, tokenizer, prompts, 30)
        ids, attn, mask = (F.pad(t, (0, 3)) for t in batch)  # as beside a longer completion
        drawn, lengths_of = len(columns), mask.sum(1)
        rows = 4 + lengths_of[4:].argsort()[:2]  # both are padded on the left
        if "Why?" not in prompts:
            rows = torch.stack([lengths_of[:4].argmin(), rows[0]])  # one of each prompt
        logp = script.completion_logp(model, ids[rows], attn[rows], mask[rows])
        values = script.critic_values(critic, ids[rows], attn[rows], mask[rows])
        gradients = []
        for network, output in ((model, logp), (critic, values)):
            network.zero_grad()
            (output * torch.arange(1.0, output.shape[1] + 1)).sum().backward()
            gradients += [p.grad.flatten().clone() for p in network.parameters()]
        found.append((texts, logp.detach(), values.detach(), gradients))
    (texts, logp, values, gradients), (texts2, logp2, values2, gradients2) = found
    assert texts == texts2
    torch.testing.assert_close(logp2, logp, rtol=0, atol=2e-5)
    torch.testing.assert_close(values2, values, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients2, gradients, strict=True):
        assert theirs.norm() > 0 and (ours - theirs).norm() < 1e-4 * theirs.norm()
    prompt, longest = ids.shape[1] - mask.shape[1], int(mask[rows].sum(1).max())
    if "Why?" in prompts:
        assert columns[0] == prompt and columns[drawn] == prompt + longest
    else:  # "<|im_start|>user\nWhat is " and all before it are read once, what only other rows have is not
        assert columns[0] < prompt / 2 and columns[drawn] == columns[0] + longest

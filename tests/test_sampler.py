"""The sampler against the training pass: each token's log-prob when drawn is its log-prob in the loss.

Catches a missing or shifted mask, a temperature on one side only, an off-by-one target, a cache fed with the wrong mask, an
end-of-turn token that is not trained, a finished row that goes on, and log-probs that need more memory than they must.
"""

import copy
from types import SimpleNamespace

import minimal_grpo
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

PROMPTS = [
    "What is 3 + 8?",
    "Hi",
    "Write about 40 words about winter.",
    "Tom has 3 apples. Ann gives Tom 4 more. How many?",
    "",
] * 4
CASES = {
    "as stored": lambda model, tokenizer: None,
    "pad is eos": lambda model, tokenizer: setattr(tokenizer, "pad_token", tokenizer.eos_token),
    "one eos id": lambda model, tokenizer: setattr(
        model.generation_config, "eos_token_id", tokenizer.eos_token_id
    ),
    "no row ends": lambda model, tokenizer: setattr(model.generation_config, "eos_token_id", [0]),
}


@pytest.fixture(
    scope="module", params=[(name, case) for name in ("qwen", "llama") for case in CASES], ids=" ".join
)
def rollout(request, tiny):
    """A mixed-length batch with the log-prob each token had when torch.multinomial drew it: (N, C)."""
    name, case = request.param
    model, tokenizer = tiny(name)
    CASES[case](model, tokenizer)
    drawn, multinomial = [], torch.multinomial

    def watched(probs, *args, **kwargs):
        tokens = multinomial(probs, *args, **kwargs)
        drawn.append(probs.gather(1, tokens).log())
        return tokens

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", watched)
        if case == "no row ends":  # not at the template's end either, but at a token that is never drawn
            patch.setattr(minimal_grpo, "end_of_turn", lambda tokenizer: tokenizer.convert_ids_to_tokens(0))
        texts, ids, attn, mask, finished = minimal_grpo.sample(model, tokenizer, PROMPTS, 80)
    return case, model, tokenizer, ids, attn, mask, texts, finished, torch.cat(drawn, 1)


def ends(model, tokenizer):
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]


def test_drawn_is_trained(rollout):
    _, model, _, ids, attn, mask, *_, drawn = rollout
    trained = minimal_grpo.completion_logp(model, ids, attn, mask)
    assert drawn.shape == mask.shape
    assert ((trained - drawn) * mask).abs().max() < 1e-4


def test_each_row_alone(rollout):
    """Against the model called on one row without padding, mask or cache, and F.cross_entropy, in float64 where the model lets it."""
    _, model, _, ids, attn, mask, *_ = rollout
    model = copy.deepcopy(model).double()
    trained = minimal_grpo.completion_logp(model, ids, attn, mask)
    for i in range(len(ids)):
        row, n = ids[i][attn[i] == 1], int(mask[i].sum())
        logits = model(row[None]).logits[0].float()
        alone = -torch.nn.functional.cross_entropy(logits[-n - 1 : -1], row[-n:], reduction="none")
        # Relative, too: transformers 4 computes norms and rotations in float32, which rounds in proportion.
        assert torch.allclose(trained[i, :n], alone, atol=1e-4, rtol=1e-4)
        assert (trained[i, n:] == 0).all()


def test_mask_counted_by_hand(rollout):
    case, model, tokenizer, ids, attn, mask, texts, finished, _ = rollout
    P = ids.shape[1] - mask.shape[1]
    assert (mask == attn[:, P:]).all()
    for i in range(len(ids)):
        expected, ended = [], False
        for token in ids[i, P:].tolist():
            expected.append(0.0 if ended else 1.0)
            ended = ended or token in ends(model, tokenizer)
        assert mask[i].tolist() == expected
        assert finished.shape == (len(ids),) and finished[i].item() == ended
        kept = ids[i, P:][mask[i] == 1].tolist()
        assert texts[i] == tokenizer.decode(kept[:-1] if ended else kept)  # all but the end of turn
    if case == "no row ends":
        assert mask.all() and not finished.any() and mask.shape[1] == 80
    else:
        assert not mask.all() and (mask.sum(1) < 80).any()
    assert len(set(mask.sum(1).tolist())) > 1 or case == "no row ends"
    assert len(set(attn[:, :P].sum(1).tolist())) > 1, "the prompts should differ in length"


def test_prompts_as_the_template_writes_them(tiny):
    for name in ("qwen", "llama"):
        model, tokenizer = tiny(name)
        ids, attn = minimal_grpo.encode_prompts(tokenizer, PROMPTS)
        for i, prompt in enumerate(PROMPTS):
            chat = [{"role": "system", "content": minimal_grpo.SYSTEM}, {"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
            )
            assert tokenizer.decode(ids[i][attn[i] == 1]) == text  # one BOS, no date of today
            assert attn[i].tolist() == sorted(attn[i].tolist()), "padding belongs on the left"


class Live(TorchDispatchMode):
    """Counts the tensors of `size` numbers or more that are alive at the same time, saved for backward or not."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made, self.peak = size, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.size:
            self.made.add(StorageWeakRef(out.untyped_storage()))
        self.peak = max(self.peak, sum(not storage.expired() for storage in self.made))
        return out


@pytest.mark.parametrize("gradients, most", [(True, 3), (False, 2)])
def test_memory(gradients, most):
    """Of (N, C, V), which a vocabulary of 150,000 makes the largest by far: logits, log-probs and one gradient."""
    N, C, V = 2, 5, 1000
    head = torch.ones(1, V, requires_grad=gradients)

    def model(ids, logits_to_keep, **kwargs):
        return SimpleNamespace(logits=torch.ones(N, logits_to_keep, 1) @ head)

    ids = torch.ones(N, 3 + C, dtype=torch.long)
    with Live(N * C * V) as live:
        logp = minimal_grpo.completion_logp(model, ids, ids, torch.ones(N, C))
        if gradients:
            logp.sum().backward()
    assert logp.shape == (N, C) and live.peak == most


def test_special_tokens_stay_in_the_text(tiny, monkeypatch):
    """A reward must see what was written: only the end of turn, and the padding after it, are not part of a text."""
    model, tokenizer = tiny("qwen")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    seven = tokenizer("7", add_special_tokens=False)["input_ids"][0]
    for draws, text in ([seven, start, seven, end], "7<|im_start|>7"), ([seven, start, start, seven], None):
        draws = iter(draws)
        monkeypatch.setattr(torch, "multinomial", lambda probs, n: torch.full((len(probs), n), next(draws)))
        texts, *_ = minimal_grpo.sample(model, tokenizer, ["Hi"], 4)
        assert texts == [text or "7<|im_start|><|im_start|>7"]

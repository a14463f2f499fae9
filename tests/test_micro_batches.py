"""How a batch is cut into micro-batches changes its memory and nothing else: catches a normalizer of the micro-batch, a metric that only
the last one gives, a gradient of theirs alone, a reference or an old log-prob that is asked for too late, and two graphs alive at once.
"""

import pytest
import torch
from conftest import PRESENT, ROOT
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

RL = [name for name in PRESENT if name not in ("minimal_sft", "minimal_dpo")]
ROWS = {  # twelve completions of different lengths
    "minimal_grpo": "--batch-size 3 --group-size 4 --epsilon 0.001",
    "minimal_ppo": "--batch-size 12 --epsilon 0.001 --critic-lr 1e-4",
    "reinforce": "--batch-size 12 --max-new-tokens 60",
    "rloo": "--batch-size 3 --group-size 4 --max-new-tokens 60",
    "gsm8k_grpo": "--batch-size 3 --group-size 4 --eval-size 0 --update-epochs 2 --epsilon 0.001 --beta 0.04",
    "gsm8k_sft_grpo": "--batch-size 3 --group-size 4 --eval-size 0 --update-epochs 2 --epsilon 0.001 --beta 0.04 --sft-steps 1",
}


@pytest.mark.parametrize("script", RL)
def test_results_do_not_depend_on_it(main, updates, script):
    """Every gradient, loss and metric of a batch, by one pass over all twelve rows and in parts of 1 and 5."""
    found = []
    for size in (12, 5, 1):
        updates.clear()
        g = main(f"{script}.py --steps 1 {ROWS[script]} --micro-batch-size {size}")
        metrics = {name: value for name, value in g["history"][0].items() if name != "seconds"}
        found.append((metrics, list(updates), g["mask"]))
    (whole, gradients, mask), *parts = found
    assert len(set(mask.sum(1).tolist())) > 2, "rows of different lengths"
    assert len(gradients) == {"reinforce": 1, "rloo": 1, "minimal_ppo": 4, "gsm8k_sft_grpo": 3}.get(script, 2)
    for metrics, gradient, _ in parts:
        assert metrics == pytest.approx(whole, rel=2e-3, abs=1e-5)
        for ours, theirs in zip(gradient, gradients, strict=True):
            assert theirs.norm() > 1e-3 and (ours - theirs).norm() < 1e-3 * theirs.norm()


def watch(monkeypatch):
    """A list of what happens: the rows of each pass, how many of them have a graph, and each backward pass."""
    events = []
    for model in (Qwen2ForCausalLM, LlamaForCausalLM):
        forward = model.forward

        def watched(self, *args, forward=forward, **kwargs):
            out = forward(self, *args, **kwargs)
            if not kwargs["use_cache"]:  # else the sampler's
                events.append((len(out.logits), out.logits.shape[1], out.logits.requires_grad))
            return out

        monkeypatch.setattr(model, "forward", watched)
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: (events.append("backward"), backward(self))[1])
    return events


@pytest.mark.parametrize("script", PRESENT)
def test_one_graph_at_a_time(main, monkeypatch, script):
    """Each pass with a graph is followed by its backward pass, and no pass has more rows than a micro-batch or columns than needed."""
    events = watch(monkeypatch)
    micro = " --micro-batch-size 5" if script in RL else " --batch-size 5"
    g = main(f"{script}.py --steps 1 {ROWS.get(script, '')}{micro}")
    passes = [event for event in events if event != "backward"]
    with_graph = [i for i, event in enumerate(events) if event != "backward" and event[2]]
    assert with_graph and all(events[i + 1] == "backward" for i in with_graph)
    assert events.count("backward") == len(with_graph)
    assert all(rows <= (10 if script == "minimal_dpo" else 5) for rows, *_ in passes)
    assert passes[-1][1] == g["mask"].shape[1]
    if (
        script == "minimal_grpo"
    ):  # reference, policy, backward; then, with the reference known, policy, backward
        kinds = ["backward" if event == "backward" else event[2] for event in events]
        assert kinds == [False, True, "backward"] * 3 + [True, "backward"] * 3
    if script == "minimal_dpo":  # the reference's pass is over before the policy's graph begins
        assert [event == "backward" or event[2] for event in events] == [False, True, True]


def test_gradient_checkpointing(main, updates, monkeypatch, tmp_path):
    """The recipe of tests/README: the same numbers with fewer activations kept, and samples that still see the whole context."""
    source = (ROOT / "minimal_grpo.py").read_text()
    for old, new in (
        ("    history = []\n", "    history = []\n    model.gradient_checkpointing_enable()\n"),
        ("            # 4. update\n", "            # 4. update\n            model.train()\n"),
        ("            # 5. report\n", "            # 5. report\n            model.eval()\n"),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "checkpointed.py").write_text(source)
    found, kept = [], []
    for path in ("minimal_grpo.py", tmp_path / "checkpointed.py"):
        updates.clear()
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            g = main(f"{path} --steps 2 --batch-size 2 --group-size 4")
        metrics = [{k: v for k, v in record.items() if k != "seconds"} for record in g["history"]]
        found.append((metrics, list(updates), g["texts"]))
        kept.append(sum(sizes))
    (plain, gradients, texts), (checkpointed, theirs, same_texts) = found
    assert (
        checkpointed == [pytest.approx(record, rel=2e-3, abs=1e-5) for record in plain]
        and texts == same_texts
    )
    for ours, other in zip(gradients, theirs, strict=True):
        assert (ours - other).norm() < 1e-3 * ours.norm()
    assert kept[1] < 0.8 * kept[0]

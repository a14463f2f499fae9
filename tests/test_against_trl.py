"""Against TRL, called on the same tiny model and the same tokens: advantages, losses and their gradients.

Catches a sign, a mask, a normaliser or a convention that only our own numbers agree with. TRL samples or pads the batch; what it
saw is laid out as our scripts do it and given to our functions. Where we differ on purpose, the difference is asserted.
"""

import math

import minimal_dpo
import minimal_grpo
import minimal_sft
import pytest
import rloo
import torch
from datasets import Dataset

trl = pytest.importorskip("trl")

SYSTEM = {"role": "system", "content": minimal_grpo.SYSTEM}
CPU = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "learning_rate": 1e-6,
    "disable_tqdm": True,
}


def exact(tiny):
    """tiny-qwen in float64, so that what remains is a difference of formulas and not of rounding."""
    model, tokenizer = tiny("qwen")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # transformers 4 adds token_type_ids
    return model.double(), tokenizer


def asked(question):
    return [SYSTEM, {"role": "user", "content": question}]


def answered(text):
    return [{"role": "assistant", "content": text}]


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()


def same(ours, theirs, model):
    """Loss to 1e-5 and gradient to 1e-5 of its length."""
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5, rel=1e-5)
    a, b = gradient(ours, model), gradient(theirs, model)
    assert b.norm() > 1e-3 and (a - b).norm() <= 1e-5 * b.norm()


def mean(token_values, mask):
    """What the scripts' loops do: the mean over all completion tokens."""
    return (token_values * mask).sum() / mask.sum()


def layout(rows):
    """(prompt ids, completion ids) a row to ids, attn, mask in the scripts' layout, padded with 0."""
    P, C = (max(len(row[k]) for row in rows) for k in (0, 1))
    ids, attn, mask = torch.zeros(len(rows), P + C, dtype=torch.long), torch.zeros(len(rows), P + C), None
    for i, (prompt, completion) in enumerate(rows):
        ids[i, P - len(prompt) : P + len(completion)] = torch.tensor(prompt + completion)
        attn[i, P - len(prompt) : P + len(completion)] = 1
    mask = attn[:, P:].clone()
    return ids, attn.long(), mask


def by_tag(prompts, completions, **kwargs):
    """A reward of many values, so that groups differ: tags, digits and length all count."""
    texts = [completion[0]["content"] for completion in completions]
    by_tag.last = [("answer>" in t) + 0.1 * sum(map(str.isdigit, t)) + 0.01 * len(t) for t in texts]
    return by_tag.last


def rollouts(trainer_class, config, model, tokenizer):
    """A trainer and what it samples and scores for five questions, four completions each."""
    questions = ["What is 3 + 8?", "What is 9 + 9?", "Hi", "What is 0 + 5?", "What is 7 + 6? Tell me."]
    rows = Dataset.from_list([{"prompt": asked(q)} for q in questions])
    trainer = trainer_class(
        model=model, reward_funcs=by_tag, args=config, train_dataset=rows, processing_class=tokenizer
    )
    torch.manual_seed(0)
    trainer.model.eval()
    batch = trainer._generate_and_score_completions([row for row in rows for _ in range(4)])
    return trainer, batch, torch.tensor(by_tag.last)


def laid_out(batch):
    rows = []
    for i in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i] == 1].tolist()
        rows.append((prompt, batch["completion_ids"][i][batch["completion_mask"][i] == 1].tolist()))
    return layout(rows)


SAMPLING = {
    "num_generations": 4,
    "max_completion_length": 24,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


@pytest.fixture(scope="module")
def grpo(tiny, tmp_path_factory):
    model, tokenizer = exact(tiny)
    config = trl.GRPOConfig(
        str(tmp_path_factory.mktemp("grpo")),
        per_device_train_batch_size=20,
        beta=0.04,
        loss_type="bnpo",  # the mean over the tokens of the batch, as ours
        num_iterations=2,
        use_bias_correction_kl=False,  # the paper's KL
        **SAMPLING,
        **CPU,
    )
    return rollouts(trl.GRPOTrainer, config, model, tokenizer)


def test_grpo_advantages(grpo):
    trainer, batch, rewards = grpo
    ours = minimal_grpo.group_advantages(rewards, 4)
    assert ours.abs().max() > 1 and torch.allclose(ours[:, 0], batch["advantages"], atol=1e-5)


def test_grpo_loss_and_gradient(grpo):
    """Off policy: old and reference log-probs are moved away from the policy's, so that ratio, clip and KL all speak."""
    trainer, batch, rewards = grpo
    ids, attn, mask = laid_out(batch)
    model = trainer.model
    logp = minimal_grpo.completion_logp(model, ids, attn, mask)
    torch.manual_seed(1)
    old_logp, ref_logp = (logp.detach() + 0.3 * torch.randn_like(logp) * mask for _ in range(2))
    moved = batch | {"old_per_token_logps": old_logp, "ref_per_token_logps": ref_logp}
    theirs = trainer._compute_loss(model, moved)
    advantages = batch["advantages"][:, None]
    token_loss, metrics = minimal_grpo.grpo_loss(
        logp, old_logp, ref_logp, advantages, trainer.epsilon_low, trainer.beta
    )
    clip_frac, kl = (mean(metrics[name], mask) for name in ("clip_frac", "kl"))
    assert 0.05 < clip_frac < 0.95 and kl > 0.01
    same(mean(token_loss, mask), theirs, model)


def test_grpo_kl_differs_from_the_default_as_stated(grpo):
    """TRL's default weighs each token's KL by the ratio (DeepSeek-V3.2); ours, as in the GRPO paper, does not."""
    trainer, batch, rewards = grpo
    ids, attn, mask = laid_out(batch)
    with torch.no_grad():
        logp = minimal_grpo.completion_logp(trainer.model, ids, attn, mask)
        torch.manual_seed(1)
        old_logp, ref_logp = (logp + 0.6 * torch.randn_like(logp) * mask for _ in range(2))
        moved = batch | {"old_per_token_logps": old_logp, "ref_per_token_logps": ref_logp}
        trainer.args.use_bias_correction_kl = True
        theirs = trainer._compute_loss(trainer.model, moved)
        trainer.args.use_bias_correction_kl = False
        advantages, r = batch["advantages"][:, None], ref_logp - logp
        token_loss, _ = minimal_grpo.grpo_loss(logp, old_logp, ref_logp, advantages, 0.2, trainer.beta)
        ours = mean(token_loss, mask)
    weighed = (((logp - old_logp).exp() - 1) * (r.exp() - r - 1) * mask).sum() / mask.sum()
    assert abs(weighed) > 1e-3
    assert theirs.item() == pytest.approx(ours.item() + trainer.beta * weighed.item(), abs=1e-5)


def test_grpo_reference_is_theirs(grpo):
    trainer, batch, rewards = grpo
    ids, attn, mask = laid_out(batch)
    ours = minimal_grpo.completion_logp(trainer.model, ids, attn, mask)
    assert torch.allclose(ours, batch["ref_per_token_logps"] * mask, atol=1e-4)


def test_grpo_paper_loss_differs_as_stated(grpo):
    """loss_type "grpo" is the paper's: a mean of each completion's mean. Ours weighs each token the same instead."""
    trainer, batch, rewards = grpo
    ids, attn, mask = laid_out(batch)
    logp = minimal_grpo.completion_logp(trainer.model, ids, attn, mask)
    kept, trainer.loss_type = trainer.loss_type, "grpo"
    theirs = trainer._compute_loss(
        trainer.model, batch | {"old_per_token_logps": None, "ref_per_token_logps": logp.detach()}
    )
    trainer.loss_type = kept
    advantages, old = batch["advantages"][:, None], logp.detach()
    token_loss, _ = minimal_grpo.grpo_loss(logp, old, old, advantages, 0.2, 0.04)
    paper = ((token_loss * mask).sum(1) / mask.sum(1)).mean()
    same(paper, theirs, trainer.model)
    assert abs(mean(token_loss, mask).item() - theirs.item()) > 1e-3


@pytest.fixture(scope="module")
def leave_one_out(tiny, tmp_path_factory):
    model, tokenizer = exact(tiny)
    folder = str(tmp_path_factory.mktemp("rloo"))
    config = trl.RLOOConfig(folder, per_device_train_batch_size=20, beta=0.0, **SAMPLING, **CPU)
    return rollouts(trl.RLOOTrainer, config, model, tokenizer)


def test_rloo_advantages(leave_one_out):
    trainer, batch, rewards = leave_one_out
    ours = rloo.leave_one_out_advantages(rewards, 4)
    assert ours.abs().max() > 0.5 and torch.allclose(ours[:, 0], batch["advantages"], atol=1e-5)


def test_rloo_gradient(leave_one_out):
    """TRL's loss is -ratio x advantage, ours -advantage x log-prob: other numbers, on policy the same gradient."""
    trainer, batch, rewards = leave_one_out
    ids, attn, mask = laid_out(batch)
    logp = rloo.completion_logp(trainer.model, ids, attn, mask)
    theirs = trainer._compute_loss(trainer.model, batch | {"old_logps": logp.detach().sum(1)})
    ours = -(batch["advantages"][:, None] * logp).sum(1).mean()  # as in the loop; test_lexical.py holds that
    a, b = gradient(ours, trainer.model), gradient(theirs, trainer.model)
    assert b.norm() > 1e-3 and (a - b).norm() <= 1e-5 * b.norm()
    assert theirs.item() == pytest.approx(-batch["advantages"].mean().item(), abs=1e-5)


def given_rows(batch):
    """TRL's right-padded batch as (prompt ids, completion ids) a row."""
    rows = []
    for ids, attn, completion in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"]):
        rows.append((ids[(attn == 1) & (completion == 0)].tolist(), ids[completion == 1].tolist()))
    return rows


@pytest.mark.parametrize(
    "name, loss_type", [("minimal_dpo", "sigmoid"), ("ipo", "ipo"), ("online_dpo", "sigmoid")]
)
def test_dpo_and_its_variants(tiny, variant, tmp_path, name, loss_type):
    """On pairs of completions of different length, away from the reference. TRL's IPO divides log-probs by the length."""
    model, tokenizer = exact(tiny)
    pairs = [
        ("What is 3 + 8?", "<answer>11</answer>", "11"),
        ("What is 0 + 5?", "<answer>5</answer>", "<answer>6</answer>"),
    ]
    pairs += [
        ("Hi", "A rather long answer of several words.", "No"),
        ("What is 9 + 9? Now.", "18", "It is 17, I think."),
    ]
    data = Dataset.from_list(
        [{"prompt": asked(q), "chosen": answered(c), "rejected": answered(r)} for q, c, r in pairs]
    )
    config = trl.DPOConfig(str(tmp_path), per_device_train_batch_size=4, beta=0.3, loss_type=loss_type, **CPU)
    trainer = trl.DPOTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    torch.manual_seed(0)
    for p in trainer.model.parameters():  # away from the reference, or every margin is 0
        p.data += 0.1 * p.data.std() * torch.randn_like(p) if p.dim() == 2 else 0
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    theirs = trainer.compute_loss(trainer.model, batch)
    rows = given_rows(batch)
    ids, attn, mask = layout(rows)
    with torch.no_grad():
        ref_logp = minimal_dpo.completion_logp(trainer.ref_model, ids, attn, mask).sum(1)
    logp = minimal_dpo.completion_logp(trainer.model, ids, attn, mask).sum(1)
    if name == "ipo":
        logp, ref_logp = logp / mask.sum(1), ref_logp / mask.sum(1)
    module = minimal_dpo if name == "minimal_dpo" else variant(name)
    loss = module.ipo_loss if name == "ipo" else module.dpo_loss
    ours, metrics = loss(*logp.chunk(2), *ref_logp.chunk(2), 0.3)
    assert abs(metrics["margin"]) > 0.01
    same(ours, theirs, trainer.model)
    # the tokens: what our own encoding makes of the same pairs, but for what the template writes after the end of the turn
    prompts, completions = [q for q, *_ in pairs] * 2, [c for _, c, _ in pairs] + [r for *_, r in pairs]
    own_ids, own_attn, own_mask = minimal_dpo.encode_completions(tokenizer, prompts, completions)
    P = own_ids.shape[1] - own_mask.shape[1]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for i, (prompt, completion) in enumerate(rows):
        assert prompt == own_ids[i, :P][own_attn[i, :P] == 1].tolist()
        own = own_ids[i, P:][own_mask[i] == 1].tolist()
        assert completion == own + newline


def test_dpo_starts_where_theirs_does(tiny, tmp_path):
    model, tokenizer = exact(tiny)
    row = {"prompt": asked("What is 3 + 8?"), "chosen": answered("11"), "rejected": answered("12")}
    config = trl.DPOConfig(str(tmp_path), per_device_train_batch_size=1, **CPU)
    trainer = trl.DPOTrainer(
        model=model, args=config, train_dataset=Dataset.from_list([row]), processing_class=tokenizer
    )
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[0]]))
    assert theirs.item() == pytest.approx(math.log(2), abs=1e-6) and trainer.beta == 0.1


def test_sft(tiny, tmp_path):
    model, tokenizer = exact(tiny)
    pairs = [
        ("What is 3 + 8?", "<answer>11</answer>"),
        ("Hi", "A rather long answer of several words."),
        ("Now?", "No"),
    ]
    data = Dataset.from_list([{"prompt": asked(q), "completion": answered(c)} for q, c in pairs])
    config = trl.SFTConfig(str(tmp_path), per_device_train_batch_size=3, completion_only_loss=True, **CPU)
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    batch["completion_mask"] = (batch["labels"] != -100).long()
    ids, attn, mask = layout(given_rows(batch))
    ours = -minimal_sft.completion_logp(trainer.model, ids, attn, mask).sum() / mask.sum()
    same(ours, theirs, trainer.model)

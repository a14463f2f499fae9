"""The diffs in tests/variants: each applies to its base, and the patched script does what it claims: losses and gradients against TRL
where TRL has them, against sums written out by hand where not.

Catches a change to one of the eight files that breaks a variant, by the variant's name; a loss that is still the base's; adapters that
are no adapters; and, under torchrun, a gradient that depends on how the batch is shared out.
"""

import itertools
import json
import math
import runpy
import shutil
import subprocess
import sys
import types

import gsm8k_grpo
import make_variants
import minimal_grpo
import pytest
import torch
from conftest import ROOT, base_of, patched
from test_other_models import KINDS, random_model
from transformers import AutoModelForCausalLM

VARIANTS = sorted((ROOT / "tests/variants").glob("*.diff"))


@pytest.mark.parametrize("diff", VARIANTS, ids=lambda diff: diff.stem)
def test_applies_cleanly(diff, tmp_path):
    """With patch and with git apply, to the same result, without an offset or fuzz: a change to the base must reach its variants."""
    path = tmp_path / "patched.py"
    path.write_text((ROOT / base_of(diff)).read_text())
    done = subprocess.run(["patch", "--fuzz=0", path, diff], capture_output=True, text=True)
    assert done.returncode == 0 and "offset" not in done.stdout, f"{diff.stem} does not apply: {done.stdout}"
    (tmp_path / "git").mkdir()
    (tmp_path / "git" / base_of(diff)).write_text((ROOT / base_of(diff)).read_text())
    subprocess.run(["git", "apply", diff], cwd=tmp_path / "git", check=True)
    assert (tmp_path / "git" / base_of(diff)).read_text() == path.read_text()


@pytest.mark.parametrize("diff", VARIANTS, ids=lambda diff: diff.stem)
def test_is_as_tidy_as_its_base(diff, tmp_path):
    path = patched(diff.stem, tmp_path)
    assert max(map(len, path.read_text().splitlines())) <= 110
    compile(path.read_text(), path, "exec")


# Runs a script with sampled tokens and drawn problems that do not depend on how the batch is shared out.
DRIVER = """
import os, random, runpy, sys, torch
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
draws = torch.rand(300, 8, generator=torch.Generator().manual_seed(5))
state = {"t": 0}

def multinomial(probs, n):  # the same draw for the same place in the group, whatever the batch
    state["t"] += 1
    u = draws[state["t"] % 300, torch.arange(len(probs)) % 4]
    return (probs.cumsum(-1) < u[:, None]).sum(-1, keepdim=True).clamp(max=probs.shape[1] - 1)

calls = {"n": 0}

def choices(rows, k):  # neighbouring problems for the processes, one process has them all
    state["t"], calls["n"] = 0, calls["n"] + 1
    first = calls["n"] * k * world + rank * k
    return rows[first : first + k]

torch.multinomial, random.choices = multinomial, choices
leave, out, sys.argv = os._exit, sys.argv[1], sys.argv[2:]

load = torch.nn.Module.to
def to(self, *args, **kwargs):  # a parameter that no pass uses, and one that is frozen
    if hasattr(self, "lm_head") and not hasattr(self, "unused"):
        self.unused = torch.nn.Parameter(torch.zeros(3))
        self.model.norm.weight.requires_grad_(False)
    return load(self, *args, **kwargs)
torch.nn.Module.to = to

updates, clip = [], torch.nn.utils.clip_grad_norm_
def clip_grad_norm(parameters, *args, **kwargs):  # what each step applies, without the parameter of three numbers
    parameters = list(parameters)
    norm = clip(parameters, *args, **kwargs)
    updates.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None and len(p) != 3]))
    return norm
torch.nn.utils.clip_grad_norm_ = clip_grad_norm

def finish(g):
    weights = torch.cat([p.detach().flatten() for name, p in g["model"].named_parameters() if name != "unused"])
    torch.save([weights, updates, torch.initial_seed()], f"{out}.{rank}")
    leave(0)

os._exit = lambda code: finish(sys._getframe(1).f_globals)  # the last statement of the variant
g = runpy.run_path(sys.argv[0], run_name="__main__")
assert world == 1, "a process of torchrun must leave by os._exit"
finish(g)
"""


def gsm8k(script, folder, processes):
    """Runs the script on 4 prompts in all, by as many processes; gives what each leaves behind, the log and the output."""
    (folder / "driver.py").write_text(DRIVER)
    out, log, saved = folder / "out", folder / f"{processes}.jsonl", folder / f"saved-{processes}"
    flags = "--steps 3 --lr 1e-6 --group-size 4 --micro-batch-size 8 --max-new-tokens 48 --eval-size 6"
    flags = f"{flags} --update-epochs 2 --beta 0.04 --batch-size {4 // processes}".split()
    flags += ["--log", log, "--save", saved]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--"]
    command = [sys.executable, *(launch if processes > 1 else []), folder / "driver.py", out, script, *flags]
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (saved / "model.safetensors").exists()
    left = [torch.load(f"{out}.{rank}") for rank in range(processes)]
    return left, [json.loads(line) for line in log.read_text().splitlines()], done.stdout


def test_two_processes_are_one(tmp_path):
    """Two processes of torchrun (gloo), two prompts each, give the gradients, the weights, the metrics and the samples of one with all four.

    The second one prints, logs and saves nothing.
    """
    (one,), log_one, _ = gsm8k("gsm8k_grpo.py", tmp_path, 1)
    two, log_two, printed = gsm8k(patched("torchrun", tmp_path), tmp_path, 2)
    for weights, updates, _ in two:
        assert len(updates) == len(one[1]) == 3 * 2  # two updates per step
        for update, wanted in zip(updates, one[1]):
            assert wanted.norm() > 0.5 and (update - wanted).abs().max() < 1e-5
        assert (weights - one[0]).abs().max() < 1e-5
    assert torch.equal(two[0][0], two[1][0]) and two[0][2] != two[1][2], (
        "each process needs a seed of its own"
    )
    assert [record["step"] for record in log_two] == [0, 0, 1, 2, 3] and "eval" in log_two[-1]
    assert len(log_one) == len(log_two) and printed.count("\nstep ") == 3
    for a, b in zip(log_one, log_two):
        samples = a.pop("samples", None), b.pop("samples", None)
        assert samples[0] == samples[1]
        a, b = a.get("eval", a), b.get("eval", b)
        assert a.pop("seconds", None) != 0 and b.pop("seconds", None) != 0
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


# ------------------------------------------------------------------ the losses against TRL


@pytest.fixture(scope="module")
def trainer(tiny, tmp_path_factory):
    """A GRPOTrainer whose loss can be asked for any tensors: its log-probs come from `trainer.logp`."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, tokenizer = tiny("qwen")
    config = trl.GRPOConfig(
        str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=4,
        num_generations=4,
        use_bias_correction_kl=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
    )
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Hi"}]}])
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda **kwargs: [0.0],
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.model.eval()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
        trainer.logp,
        trainer.logp * 0,
        None,
    )
    return trainer


FLAGS = "--steps 1 --batch-size 8 --group-size 4 --max-new-tokens 12 --lr 1.5e-5 --update-epochs 4 --beta 0.04 --seed 1"
FLAGS += " --micro-batch-size 64"  # all rows at once, so that logp and loss are those of the batch
LOSSES = {  # what TRL calls them
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon_low": 3e-4,
        "epsilon_high": 4e-4,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
}


@pytest.fixture
def last_update(main, monkeypatch, tmp_path):
    """last_update("gspo", flags): the globals of the run, whose `logp` has the gradient that the loss gave it."""
    backward = torch.Tensor.backward

    def watched(self):
        logp = sys._getframe(1).f_globals.get("logp")
        if logp is not None and logp.requires_grad:
            logp.retain_grad()
        backward(self)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    return lambda name, flags: main(f"{patched(name, tmp_path)} {flags}")


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_trls(trainer, last_update, monkeypatch, name):
    """The last of four updates of a real batch: ratios away from 1, rows of different length, some cut off, a KL term."""
    g = last_update(name, FLAGS)
    mask = g["mask"] * g["finished"][:, None] if name == "dapo" else g["mask"]
    assert len(set(g["mask"].sum(1).tolist())) > 2 and not g["finished"].all() and g["finished"].any()
    ratio = torch.exp(g["logp"] - g["old_logp"])[g["mask"] == 1]
    assert ratio.min() < 0.9 and ratio.max() > 1.1
    trainer.logp = g["logp"].detach().clone().requires_grad_()
    settings = {"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.04}
    for setting, value in (settings | {"max_completion_length": 12} | LOSSES[name]).items():
        monkeypatch.setattr(trainer, setting, value)
    P = g["ids"].shape[1] - g["mask"].shape[1]
    inputs = {
        "prompt_ids": g["ids"][:, :P],
        "prompt_mask": g["attn"][:, :P],
        "completion_ids": g["ids"][:, P:],
        "completion_mask": mask,
        "advantages": g["advantages"],
        "old_per_token_logps": g["old_logp"],
        "ref_per_token_logps": g["ref_logp"],
        "num_items_in_batch": mask.sum(),
    }
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    assert g["loss"].item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    gradient = g["logp"].grad
    assert (gradient - trainer.logp.grad).norm() <= 1e-5 * gradient.norm() and gradient.norm() > 1e-3
    base, _ = minimal_grpo.grpo_loss(g["logp"], g["old_logp"], g["ref_logp"], g["advantages"], 0.2, 0.04)
    base = (base * g["mask"]).sum() / g["mask"].sum()
    assert abs(base.item() - theirs.item()) > 1e-4, "the base's loss must not pass for the variant's"


def test_simpo_is_trls(variant):
    cpo = pytest.importorskip("trl.experimental.cpo")
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 6, requires_grad=True)
    settings = {"loss_type": "simpo", "simpo_gamma": 0.7, "beta": 1.5, "alpha": 0.0, "label_smoothing": 0.0}
    fake = types.SimpleNamespace(accelerator=types.SimpleNamespace(device="cpu"), **settings)
    theirs, *_ = cpo.CPOTrainer.cpo_loss(fake, chosen, rejected)
    ours, metrics = variant("simpo").simpo_loss(chosen, rejected, 1.5, 0.7)
    assert ours.item() == pytest.approx(theirs.mean().item(), rel=1e-6)
    for a, b in zip(*(torch.autograd.grad(loss, (chosen, rejected)) for loss in (ours, theirs.mean()))):
        assert torch.allclose(a, b, atol=1e-7)
    assert metrics["margin"].item() == pytest.approx(1.5 * (chosen - rejected).mean().item())


def test_simpo_takes_means(main, tmp_path):
    """With a learning rate of 0 the last loss can be taken again, from each completion's mean log-prob."""
    g = main(f"{patched('simpo', tmp_path)} --steps 1 --lr 0 --batch-size 6 --beta 2 --gamma 0.3")
    with torch.no_grad():
        logp = g["completion_logp"](g["model"], g["ids"], g["attn"], g["mask"])
    means = [logp[i, : int(g["mask"][i].sum())].mean().item() for i in range(12)]
    losses = [math.log(1 + math.exp(-(2 * (means[i] - means[i + 6]) - 0.3))) for i in range(6)]
    assert g["loss"].item() == pytest.approx(sum(losses) / 6, rel=1e-4)


# ------------------------------------------------------------------ the others, by hand


def test_reinforce_plus_plus(last_update, variant):
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    centered = [0 - 2 / 3, 1 / 3, 1 / 3, 0, 0, 0]  # groups of three
    tokens = [centered[i] for i in range(6) for t in range(int(mask[i].sum()))]
    mean = sum(tokens) / len(tokens)
    std = math.sqrt(sum((x - mean) ** 2 for x in tokens) / (len(tokens) - 1))
    advantages = variant("reinforce_plus_plus").batch_advantages(rewards, 3, mask)
    for i in range(6):
        for t in range(int(mask[i].sum())):
            wanted = (centered[i] - mean) / (std + 1e-4)
            assert advantages[i, t].item() == pytest.approx(wanted, abs=1e-6)
    equal = variant("reinforce_plus_plus").batch_advantages(torch.full((6,), 1.2), 3, mask)
    assert (equal == 0).all()
    g = last_update("reinforce_plus_plus", FLAGS)
    assert (g["advantages"] == g["batch_advantages"](g["rewards"], 4, g["mask"])).all()
    check_clipped_loss(g, g["mask"], g["mask"].sum())


def check_clipped_loss(g, mask, normalizer, epsilon=0.2, beta=0.04):
    """The loss, token by token, with the advantages of the run."""
    total = 0.0
    advantages = g["advantages"].expand_as(g["mask"])
    for i, t in mask.nonzero().tolist():
        logp, old, a = (g[name][i, t].item() for name in ("logp", "old_logp")), None, advantages[i, t].item()
        logp, old = logp
        ratio = math.exp(logp - old)
        total -= min(ratio * a, min(max(ratio, 1 - epsilon), 1 + epsilon) * a)
        if beta:
            ref = g["ref_logp"][i, t].item()
            total += beta * (math.exp(ref - logp) - (ref - logp) - 1)
    assert g["loss"].item() == pytest.approx(total / normalizer.item(), rel=1e-4, abs=1e-6)


def test_raft(last_update, variant):
    rewards = torch.tensor([0.0, 1.0, -1.0, 0.5])
    assert variant("raft").accepted(rewards).tolist() == [[0.0], [1.0], [0.0], [1.0]]
    g = last_update("raft", FLAGS.replace("--beta 0.04", "--beta 0"))
    assert 0 < g["advantages"].mean() < 1 and g["reference"] is None
    check_clipped_loss(g, g["mask"], g["mask"].sum(), beta=0)


def test_maxrl(last_update, variant):
    """Its expected gradient, over all outcomes of four completions, is that of log p's series up to the third term:
    of -(1 - p) - (1 - p)^2 / 2 - (1 - p)^3 / 3 (the fourth sample is the baseline of the others)."""
    advantages = variant("maxrl").group_advantages
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1])
    wanted = [3, -1, -1, -1, 1 / 3, 1 / 3, -1, 1 / 3, 0, 0, 0, 0, 0, 0, 0, 0]
    assert advantages(rewards, 4).squeeze(1).tolist() == pytest.approx(wanted)
    for p in (0.05, 0.5, 0.9):
        expected = 0.0
        for outcome in itertools.product((0.0, 1.0), repeat=4):
            probability = math.prod(p if right else 1 - p for right in outcome)
            slopes = [
                1 / p if right else -1 / (1 - p) for right in outcome
            ]  # d log(probability of the completion) / dp
            weights = advantages(torch.tensor(outcome), 4).squeeze(1).tolist()
            expected += probability * sum(a * slope for a, slope in zip(weights, slopes)) / 4
        assert expected == pytest.approx(1 + (1 - p) + (1 - p) ** 2, rel=1e-5)
    g = last_update(
        "maxrl", FLAGS.replace("--beta 0.04", "--beta 0").replace("--update-epochs 4", "--update-epochs 1")
    )
    assert g["advantages"].max() > 1 and g["reference"] is None
    gradient = -g["advantages"] * g["mask"] / g["mask"].sum()
    assert torch.allclose(g["logp"].grad, gradient, atol=1e-7)


def test_bf16(main, updates, monkeypatch, tmp_path):
    """What is in which type, that the sampler is renewed, that the first ratio is 1, and what checkpointing leaves as it is."""
    flags = "--steps 2 --lr 3e-6 --batch-size 2 --group-size 4 --max-new-tokens 24 --eval-size 4 --update-epochs 1 --beta 0.04 --seed 1"
    products, linear = set(), torch.nn.functional.linear

    def watched(x, weight, bias=None):
        out = linear(x, weight, bias)
        products.add((weight.requires_grad, weight.dtype, out.dtype))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    g = main(f"{patched('bf16', tmp_path)} {flags}")
    assert products == {(True, torch.float32, torch.bfloat16), (False, torch.bfloat16, torch.bfloat16)}, (
        "policy, copies"
    )
    assert {p.dtype for p in g["model"].parameters()} == {torch.float32}
    start = AutoModelForCausalLM.from_pretrained(ROOT / "tests/tiny-qwen", dtype=torch.float32)
    for p, sampler, reference, first in zip(
        *(m.parameters() for m in (g["model"], g["sampler"], g["reference"], start))
    ):
        assert torch.equal(sampler, p.bfloat16()) and sampler.dtype == torch.bfloat16
        assert torch.equal(reference, first.bfloat16())
    moved = zip(g["sampler"].parameters(), g["reference"].parameters())
    assert any(not torch.equal(a, b) for a, b in moved), (
        "some weights moved far enough to be rounded elsewhere"
    )
    angles = {m.model.rotary_emb.inv_freq.dtype for m in (g["sampler"], g["reference"])}
    assert angles == {torch.float32}, (
        "rounded, they would turn the keys by tenths of a radian at position 400"
    )
    assert g["logp"].dtype == torch.float32 and torch.equal(g["logp"].detach(), g["old_logp"][g["rows"]])
    with torch.no_grad():
        first.requires_grad_(False)
        inputs = (g["ids"], g["attn"], g["mask"])
        exact = g["completion_logp"](start, *inputs)
        copy = g["completion_logp"](g["reference"], *inputs)
    rounding = (g["ref_logp"] - exact).abs()
    assert torch.equal(copy, g["ref_logp"]) and 1e-4 < rounding.max() < 0.3, "bfloat16's, not float32's"
    assert 0 < g["history"][0]["kl"] < 1e-2, "rounding: nothing has been learned yet"
    wanted = list(updates)
    updates.clear()
    g = main(f"{patched('bf16', tmp_path)} {flags} --gradient-checkpointing")
    assert g["model"].is_gradient_checkpointing and g["model"].training and not g["sampler"].training
    assert len(updates) == 2 and all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(updates, wanted)
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """What `minimal_sft.py --save teacher` writes."""
    folder = tmp_path_factory.mktemp("teacher")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["minimal_sft.py", "--save", str(folder)])
    runpy.run_path("minimal_sft.py", run_name="__main__")
    monkeypatch.undo()
    return folder


def test_distillation(last_update, teacher):
    g = last_update(
        "on_policy_distillation", f"{FLAGS.replace('--beta 0.04', '--beta 0')} --teacher {teacher}"
    )
    with torch.no_grad():
        theirs = g["completion_logp"](g["teacher"], g["ids"], g["attn"], g["mask"])
    assert torch.allclose(g["advantages"], theirs - g["old_logp"], atol=1e-5)
    assert g["advantages"].shape == g["mask"].shape and g["advantages"].abs().max() > 0.1
    assert not any(p.requires_grad for p in g["teacher"].parameters()) or g["teacher"] is not g["model"]
    check_clipped_loss(g, g["mask"], g["mask"].sum(), beta=0)
    kl = -(g["advantages"][g["mask"] == 1]).mean().item()
    assert g["history"][-1]["teacher_kl"] == pytest.approx(kl, rel=1e-4)


def test_distillation_has_nothing_to_learn_from_itself(last_update):
    flags = "--steps 1 --batch-size 2 --update-epochs 1 --teacher tests/tiny-qwen"
    g = last_update("on_policy_distillation", flags)
    assert g["logp"].grad.abs().max() < 1e-6 and g["loss"].abs() < 1e-6


def test_a_teacher_of_another_vocabulary_is_an_error(main, tmp_path):
    with pytest.raises(AssertionError, match="another vocabulary"):
        main(f"{patched('on_policy_distillation', tmp_path)} --teacher tests/tiny-llama")


def test_reward_model(main, variant, tiny, tmp_path, capsys):
    predicted = torch.tensor([0.3, -0.2, 1.0, 0.5])
    rewards = torch.tensor([1.0, 0.0, 0.0, 2.0])
    pairs = [(0, 1), (0, 2), (3, 0), (3, 1), (3, 2)]
    losses = [math.log(1 + math.exp(predicted[b] - predicted[a])) for a, b in pairs]
    ours = variant("reward_model").bradley_terry_loss(predicted, rewards)
    assert ours.item() == pytest.approx(sum(losses), rel=1e-6)
    assert variant("reward_model").bradley_terry_loss(predicted, torch.ones(4)) == 0

    flags = "--steps 1 --reward-steps 3 --reward-lr 1e-4 --batch-size 4"  # less would be rounded away in the large gains
    g = main(f"{patched('reward_model', tmp_path)} {flags}")
    assert "reward model step 0  loss 0.6931\n" in capsys.readouterr().out, "log 2, a mean over all pairs"
    judge, fresh = g["reward_model"], tiny("qwen")[0]
    assert not any(p.requires_grad for p in judge.parameters()) and judge.lm_head.weight.shape == (1, 128)
    for name, p in judge.named_parameters():
        start = torch.zeros(1, 128) if name == "lm_head.weight" else fresh.get_parameter(name)
        assert not torch.equal(p, start), f"{name} of the reward model did not move"
    with torch.no_grad():
        for i, reward in enumerate(g["rewards"].tolist()):  # each row alone, without padding
            row = g["ids"][i][g["attn"][i] == 1]
            alone = judge.model(row[None]).last_hidden_state[0, -1] @ judge.lm_head.weight[0]
            assert reward == pytest.approx(alone.item(), rel=1e-3, abs=1e-4)
    true = [g["score"](t, a)["reward"] for t, a in zip(g["texts"], g["answers"])]
    assert g["history"][0]["reward"] == pytest.approx(sum(true) / len(true))
    assert g["history"][0]["model_reward"] == pytest.approx(g["rewards"].mean().item())
    assert torch.allclose(g["advantages"], g["group_advantages"](g["rewards"], 8))


def test_lora(main, variant, tiny, tmp_path):
    module, (model, tokenizer), (base, _) = variant("lora"), tiny("qwen"), tiny("qwen")
    texts, ids, attn, mask, _ = module.sample(model, tokenizer, ["What is 3 + 8?", "Hi"] * 3, 12)
    before = module.completion_logp(base, ids, attn, mask)
    adapters = module.add_adapters(model, 4, 2.0)
    assert torch.equal(module.completion_logp(model, ids, attn, mask), before), "B starts at 0"
    assert {id(a) for a in adapters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(adapters) == 2 * 7 * model.config.num_hidden_layers  # q k v o, gate up down
    with torch.no_grad():
        for a in adapters:
            a += 0.002 * torch.randn_like(a)  # times inputs that tests/make_tiny.py made large
        changed = module.completion_logp(model, ids, attn, mask)
        assert (changed - before).abs().max() > 0.01
        layer, x = model.model.layers[1].mlp.up_proj, torch.randn(3, 128)
        by_hand = layer.weight @ x.T + 2.0 * layer.lora_b @ (layer.lora_a @ x.T)
        assert torch.allclose(layer(x).T, by_hand, atol=1e-4, rtol=1e-4)
        module.scale_adapters(model, 0.0)
        assert torch.equal(module.completion_logp(model, ids, attn, mask), before)
        module.merge_adapters(model, 2.0)  # switched off, as when a reference pass is interrupted
        assert (module.completion_logp(model, ids, attn, mask) - changed).abs().max() < 1e-4
    assert model.state_dict().keys() == base.state_dict().keys()

    g = main(f"{patched('lora', tmp_path)} --steps 2 --batch-size 2 --save {tmp_path / 'saved'}")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    moved = {n for n, p in merged.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert moved == {n for n, p in base.named_parameters() if "_proj.weight" in n}
    assert g["history"][0]["kl"] > 0
    with torch.no_grad():
        ref_logp = g["completion_logp"](base, g["ids"], g["attn"], g["mask"])
    assert torch.allclose(g["ref_logp"], ref_logp, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma3", "gemma4"])
def test_shared_prompts_change_no_number(variant, monkeypatch, kind):
    """Log-probs and gradients equal those of whole rows; so do the log-probs at which the tokens were drawn."""
    if kind not in KINDS:
        pytest.skip("not in the installed transformers")
    module = variant("shared_prompts")
    model, tokenizer = random_model(kind, "two", "own")
    model.double()  # so that what remains is a difference of computation and not of rounding
    drawn, multinomial = [], torch.multinomial

    def watched(probs, n):
        tokens = multinomial(probs, n)
        drawn.append(probs.gather(1, tokens).log())
        return tokens

    monkeypatch.setattr(torch, "multinomial", watched)
    prompts = [p for p in ["What is 3 + 8?", "", "Write about 40 words about winter."] for _ in range(3)]
    _, ids, attn, mask, _ = module.sample(model, tokenizer, prompts, 12)
    passes, forward = [], model.forward
    model.forward = lambda ids, *args, **kwargs: passes.append(len(ids)) or forward(ids, *args, **kwargs)
    shared = module.completion_logp(model, ids, attn, mask)
    assert passes == [3, 9], "each prompt once, each completion once"
    model.forward = forward
    whole = minimal_grpo.completion_logp(model, ids, attn, mask)
    assert (shared - whole).abs().max() < 1e-5 and (shared - torch.cat(drawn, 1) * mask).abs().max() < 1e-4
    weights = torch.randn_like(mask)
    a, b = (torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (shared, whole))
    a, b = (torch.cat([x.flatten() for x in y]) for y in (a, b))
    assert (a - b).norm() < 1e-5 * b.norm()
    part = torch.tensor([1, 2, 3, 5, 6, 0])  # a micro-batch: parts of groups, a prompt that comes back
    part = module.completion_logp(model, ids[part], attn[part], mask[part]) - whole[part]
    assert part.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["lfm2", "qwen3-next", "qwen3.5"])
def test_shared_prompts_end_where_they_cannot_work(variant, kind):
    """Rather than to go on with a state that was not copied for the rows of the group."""
    if kind not in KINDS:
        pytest.skip("not in the installed transformers")
    model, tokenizer = random_model(kind, "two", "own")
    with pytest.raises(AttributeError, match="batch_select_indices"):
        variant("shared_prompts").sample(model, tokenizer, ["Hi"] * 4, 4)


def test_dapo_by_hand(variant):
    module = variant("dapo")
    penalties = module.length_penalty(torch.tensor([0.0, 80.0, 85.0, 90.0, 100.0, 120.0]), 100)
    assert penalties.tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    flat, mixed = [1.0, 1.0], [0.0, 1.0]
    rewards = torch.tensor(flat + mixed + flat + mixed + mixed)
    assert module.rows_to_train(rewards, 2, 2).tolist() == [2, 3, 6, 7]
    assert module.rows_to_train(rewards, 2, 4).tolist() == [2, 3, 6, 7, 8, 9]
    assert len(module.rows_to_train(torch.ones(6), 2, 2)) == 0


@pytest.mark.parametrize("name", ["dapo", "online_dpo"])
def test_it_ends_when_no_rewards_ever_differ(main, capsys, tmp_path, name):
    """No step waits for a group or a pair that never comes, and none of them moves the model."""
    path = patched(name, tmp_path)
    path.write_text(path.read_text().replace("float(one_pair and", "float(False and"))
    before = AutoModelForCausalLM.from_pretrained(ROOT / "tests/tiny-qwen", dtype=torch.float32)
    g = main(f"{path} --steps 3 --batch-size 2")
    assert not g["history"] and capsys.readouterr().out.count("nothing to learn") == 3
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), g["model"].parameters()))


def test_dapo_reports_all_that_was_drawn(main, tmp_path):
    """The reward in the log is the mean over everything sampled, not over the groups that were chosen."""
    g = main(f"{patched('dapo', tmp_path)} --steps 1 --batch-size 3 --oversample 4 --log {tmp_path / 'log'}")
    step = json.loads((tmp_path / "log").read_text().splitlines()[1])
    assert len(step["samples"]) == 3 * 4 * 8 and len(g["ids"]) <= 3 * 8
    assert step["reward"] == pytest.approx(sum(s["reward"] for s in step["samples"]) / 96)


def test_online_dpo(main, variant, tmp_path):
    pairs = variant("online_dpo").ranked_pairs
    assert pairs(torch.tensor([0.0, 1.0, 1.0, 0.5, 1.0, 0.0, 1.0, 0.5])).tolist() == [4, 1, 0, 5]
    assert len(pairs(torch.ones(6))) == 0
    g = main(f"{patched('online_dpo', tmp_path)} --steps 1 --batch-size 12 --beta 0.3")
    assert g["prompts"][:12] == g["prompts"][12:]
    n = len(g["rows"]) // 2
    for better, worse in zip(g["rows"][:n].tolist(), g["rows"][n:].tolist(), strict=True):
        assert better % 12 == worse % 12 and g["rewards"][better] > g["rewards"][worse]
    assert 0 < n < 12 and g["history"][0]["pairs"] == n and len(g["ids"]) == 2 * n
    assert g["history"][0]["loss"] == pytest.approx(math.log(2))


def test_actor_critic(main, variant, tiny, tmp_path):
    flags = "--steps 2 --batch-size 3 --micro-batch-size 3 --max-new-tokens 24 --lr 0"
    g = main(f"{patched('actor_critic', tmp_path)} {flags}")
    model, mask = tiny("llama")[0], g["mask"]
    assert g["values"].abs().max() > 0, "the head has learned something in the first step"
    logp = g["completion_logp"](model, g["ids"], g["attn"], mask)
    total, value_loss = 0.0, 0.0
    for i, n in enumerate(mask.sum(1).int().tolist()):
        assert (g["values"][i, n:] == 0).all()
        for t in range(n):
            advantage = g["rewards"][i].item() - g["values"][i, t].item()
            assert g["advantages"][i, t].item() == pytest.approx(advantage, abs=1e-5)
            total -= advantage * logp[i, t].item()
            value_loss += advantage**2 / 2
    assert g["loss"].item() == pytest.approx(total / 3, rel=1e-4)
    assert g["history"][-1]["value_loss"] == pytest.approx(value_loss / mask.sum().item(), rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), g["model"].parameters())), "lr is 0"


def test_a_value_reads_the_text_before_its_token(variant, tiny):
    module, (model, tokenizer) = variant("actor_critic"), tiny("llama")
    torch.manual_seed(0)
    _, ids, attn, mask, _ = module.sample(model, tokenizer, ["Hi", module.PROMPTS[0]], 8)
    features = module.token_features(model, ids, attn, mask)
    assert not features.requires_grad
    for i, n in enumerate(mask.sum(1).int().tolist()):
        row = ids[i][attn[i] == 1]
        for t in range(n):
            hidden = model.model(row[None, : len(row) - n + t]).last_hidden_state[0, -1]
            assert torch.allclose(features[i, t], hidden / hidden.norm(), atol=1e-5)


def test_shared_prompts_take_the_same_steps(main, tmp_path):
    """The same completions, rewards and gradients as minimal_grpo.py, from the same seed."""
    flags = "--steps 3 --batch-size 4 --group-size 4"
    base = main(f"minimal_grpo.py {flags}")
    shared = main(f"{patched('shared_prompts', tmp_path)} {flags}")
    assert shared["texts"] == base["texts"]
    for a, b in zip(shared["history"], base["history"], strict=True):
        assert a.pop("seconds") and b.pop("seconds")
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


class PretendGraph:
    """torch.cuda.CUDAGraph and torch.cuda.graph on a CPU: the pass is recorded, not run; replay runs it on the same tensors."""

    def __init__(self, model):
        self.model, self.forward, self.replays = model, model.forward, 0

    def __enter__(self):
        def record(*args, **kwargs):
            self.call = args, kwargs
            self.logits = torch.full((len(args[0]), 1, self.model.config.vocab_size), math.nan)
            return types.SimpleNamespace(logits=self.logits)

        self.model.forward = record

    def __exit__(self, *error):
        self.model.forward = self.forward

    def replay(self):
        args, kwargs = self.call
        self.logits.copy_(self.forward(*args, **kwargs).logits)
        self.replays += 1


class PretendCuda(str):
    """A device that torch takes for the CPU and the script for CUDA."""

    def __eq__(self, other):
        return other == "cuda"


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_cuda_graph_samples_the_same_tokens(variant, monkeypatch, kind, device, greedy):
    """With the static cache alone, and with a graph that reads and writes what stood in memory when it was recorded."""
    module, graphs = variant("cuda_graph"), []
    model, tokenizer = random_model(kind, "two", "own")
    model.double()  # the two caches round differently
    prompts = ["What is 3 + 8?", "", "Write about 40 words about winter."] * 3
    torch.manual_seed(0)
    want = gsm8k_grpo.sample(model, tokenizer, prompts, 12, greedy)
    if device == "cuda":
        monkeypatch.setattr(module, "DEVICE", PretendCuda("cpu"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(PretendGraph(model)) or graphs[-1])
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    torch.manual_seed(0)
    texts, *rest = module.sample(model, tokenizer, prompts, 12, greedy)
    assert texts == want[0] and all(torch.equal(a, b) for a, b in zip(rest, want[1:], strict=True))
    assert [graph.replays for graph in graphs] == ([want[3].shape[1] - 2] if device == "cuda" else [])


def test_plain(main, tiny, updates, tmp_path):
    """The gradient, in micro-batches of three, is that of the sum written out; there is no second model and no second update."""
    flags = "--steps 1 --batch-size 4 --group-size 4 --max-new-tokens 48 --eval-size 4 --micro-batch-size 3"
    g = main(f"{patched('plain', tmp_path)} {flags}")
    model, rewards = tiny("qwen")[0], g["rewards"].tolist()
    logp = g["completion_logp"](model, g["ids"], g["attn"], g["mask"])
    loss = 0
    for i, reward in enumerate(rewards):
        group = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        loss = loss - (reward - sum(group) / 4) * logp[i].sum() / g["mask"].sum()
    loss.backward()
    wanted, (got,) = torch.cat([p.grad.double().flatten() for p in model.parameters()]), updates
    assert g["history"][0]["grad_norm"] == pytest.approx(wanted.norm().item(), rel=1e-4) and wanted.norm() > 1
    assert (got - wanted / wanted.norm()).norm() < 1e-4, "clipped to norm 1"
    assert "reference" not in g


def test_ipo_is_squared(main, tmp_path):
    """By hand from the summed log-probs of a last step, against a reference that stayed where the policy began."""
    g = main(f"{patched('ipo', tmp_path)} --steps 2 --lr 1e-5 --batch-size 4 --beta 0.2")
    gaps = (g["chosen"] - g["ref_chosen"]) - (g["rejected"] - g["ref_rejected"])
    assert g["loss"].item() == pytest.approx(sum((x - 2.5) ** 2 for x in gaps.tolist()) / 4, rel=1e-5)
    assert (
        g["history"][-1]["margin"] == pytest.approx(gaps.mean().item(), rel=1e-5) and gaps.abs().max() > 0.1
    )


ROWS = {  # twelve completions of different lengths
    "plain": "--steps 1 --batch-size 3 --group-size 4 --eval-size 0",
    "actor_critic": "--steps 2 --batch-size 12 --max-new-tokens 60",
}


@pytest.mark.parametrize("name", ROWS)
def test_results_do_not_depend_on_micro_batches(main, updates, tmp_path, name):
    """Every gradient and metric, as in tests/test_micro_batches.py; a second step depends on what the value head learned in the first."""
    found = []
    for size in (12, 5):
        updates.clear()
        g = main(f"{patched(name, tmp_path)} {ROWS[name]} --micro-batch-size {size}")
        metrics = [{name: x for name, x in record.items() if name != "seconds"} for record in g["history"]]
        found.append((metrics, list(updates), g))
    (whole, gradients, g), (parts, gradients_of_parts, _) = found
    assert len(set(g["mask"].sum(1).tolist())) > 2, "rows of different lengths"
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5)
    for ours, theirs in zip(gradients_of_parts, gradients, strict=True):
        assert theirs.norm() > 1e-3 and (ours - theirs).norm() < 1e-3 * theirs.norm()


# ------------------------------------------------------------------ all of them


MICRO = {  # flags that let the clips act and the completions differ
    "cispo": "--ratio-max 1",
    "dapo": "--epsilon 0.001 --epsilon-high 0.002",
    "dr_grpo": "--epsilon 0.001",
    "gspo": "--epsilon 0.002 --epsilon-high 0.003",
    "lora": "--epsilon 0.001",
    "maxrl": "--update-epochs 2 --epsilon 0.001",
    "on_policy_distillation": "--epsilon 0.001",
    "raft": "--epsilon 0.001",
    "reinforce_plus_plus": "--epsilon 0.001",
    "sapo": "",
    "shared_prompts": "--epsilon 0.001",
}


@pytest.mark.parametrize("name", MICRO)
def test_variants_do_not_depend_on_the_micro_batch(main, updates, teacher, tmp_path, name):
    """As test_micro_batches.py has it for the scripts: twelve rows at once against parts of 5, 5 and 2."""
    flags = f"--steps 1 --batch-size 3 --group-size 4 --max-new-tokens 10 --beta 0.04 --seed 1 {MICRO[name]}"
    flags += f" --teacher {teacher}" if name == "on_policy_distillation" else ""
    script, found = patched(name, tmp_path), []
    for size in (12, 5):
        updates.clear()
        g = main(f"{script} {flags} --micro-batch-size {size}")
        metrics = {metric: value for metric, value in g["history"][0].items() if metric != "seconds"}
        found.append((metrics, list(updates)))
    (whole, wanted), (parts, gradients) = found
    assert g["mask"].shape[0] == 12 and len(set(g["mask"].sum(1).tolist())) > 2
    assert 0 < g["finished"].sum() < 12 and whole["kl"] > 0
    assert name == "sapo" or 0 < whole["clip_frac"] < 1
    assert parts == pytest.approx(whole, rel=2e-3, abs=1e-5) and len(gradients) == 2
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert theirs.norm() > 1e-3 and (ours - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.parametrize("name", ["dr_grpo", "lora", "online_dpo", "on_policy_distillation"])
def test_it_learns(main, tmp_path, teacher, name):
    """Eight steps on one seed, for time; all variants, three seeds and thirty steps: tests/make_variants.py."""
    flags = f"--steps 8 --seed 3 --log {tmp_path / 'log'}"
    flags += (
        " --lr 3e-6" if name == "online_dpo" else " --micro-batch-size 64"
    )  # it learns from few of its completions
    flags += f" --teacher {teacher}" if name == "on_policy_distillation" else ""
    main(f"{patched(name, tmp_path)} {flags}")
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert log[-1]["eval"]["reward"] >= log[0]["eval"]["reward"] + 0.1


def test_readme_is_written_from_the_diffs(monkeypatch, tmp_path):
    """And from what was measured: `uv run tests/make_variants.py --write` changes nothing."""
    shutil.copytree(ROOT / "tests/variants", tmp_path / "variants")
    monkeypatch.setattr(make_variants, "FOLDER", tmp_path / "variants")
    make_variants.write()
    for path in (ROOT / "tests/variants").iterdir():
        assert (tmp_path / "variants" / path.name).read_bytes() == path.read_bytes(), path.name
    readme = (ROOT / "tests/variants/README.md").read_text()
    assert all(f"| [{diff.stem}](#{diff.stem}) |" in readme for diff in VARIANTS)

"""SFT on gold solutions, then GRPO (2402.03300) from there, on GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

    sft_objective = mean of logp over the tokens of the solutions, end-of-turn token included
    advantage = (reward - group mean) / (group std + 1e-4)
    surrogate = min(ratio * advantage, clip(ratio, 1 ± epsilon) * advantage), ratio = exp(logp - old_logp)
    objective = surrogate - beta * kl, where kl = exp(ref_logp - logp) - (ref_logp - logp) - 1

GRPO starts with a fresh optimizer, and its reference is the model after SFT, or the KL would pull back to the
one before. Differences from the paper: those of minimal_grpo.py. Run: uv run gsm8k_sft_grpo.py
"""

import argparse, collections, copy, json, os, random, re, sys, time, dotenv, torch

dotenv.load_dotenv()  # before transformers, which reads HF_HOME and HF_HUB_OFFLINE when it is imported
import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
MODEL, TINY = "Qwen/Qwen2.5-0.5B-Instruct", "tests/tiny-qwen"  # without a GPU TINY stands in for MODEL
DATASET, TINY_DATASET = "openai/gsm8k", "tests/tiny-gsm8k"
SYSTEM = "Solve the problem step by step. End with a last line of the form: #### <number>"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


def parse_args():
    """The command line, every value checked before anything is loaded; in a notebook the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tiny = DEVICE == "cpu" and os.path.isdir(TINY)
    flags = {"model": TINY if tiny else MODEL, "dataset": TINY_DATASET if tiny else DATASET, "steps": 30}
    flags |= {"batch-size": 4, "group-size": 8, "micro-batch-size": 2, "max-new-tokens": 256, "lr": 2e-6}
    flags |= {"update-epochs": 2, "epsilon": 0.2, "beta": 0.04, "eval-size": 1319, "sft-steps": 3}
    for name, default in (flags | {"seed": 0, "log": os.devnull, "save": ""}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    args = parser.parse_args([] if "ipykernel" in sys.modules else None)
    for name, value in vars(args).items():
        least, most = (0, 1) if type(value) is float else ({"group_size": 2, "seed": 0}.get(name, 1), 10**9)
        if not isinstance(value, str) and not least <= value <= most:  # neither nan nor inf is
            parser.error(f"argument --{name.replace('_', '-')}: {value} is not from {least} to {most}")
    try:
        if args.save and (os.makedirs(args.save, exist_ok=True) or os.listdir(args.save)):
            parser.error(f"argument --save: {args.save} is not empty")
        args.log = open(os.devnull if RANK else args.log, "w", buffering=1)
    except OSError as error:
        parser.error(f"argument --save or --log: {error}")
    return args


def numbers(text):
    """All numbers of a text: -$1,234.50 is one; 20-5, 3/4 and 10^3 are two each."""
    found = re.findall(r"(?<![\d.])(?:-\$?|\$-?)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)", text)
    return [float(re.sub("[$,]", "", number)) for number in found]


def gsm8k_reward(solution, text):
    """Accuracy: just the right number is on the line of the last ####; lenient: it comes last. 0.0 or 1.0."""
    gold, (_, mark, end) = numbers(solution)[-1:], text.rpartition("####")
    strict = mark != "" and numbers(end.strip().partition("\n")[0]) == gold != []
    return {"accuracy": float(strict), "lenient": float(numbers(text)[-1:] == gold != [])}


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new_tokens, greedy=False):
    """Completions at temperature 1: ids, attn (N, P+C), mask (N, C), texts, alive (N, 1): 1 where cut off."""
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": q}] for q in prompts]
    fixed = {"return_dict": True, "return_tensors": "pt", "date_string": "26 Jul 2024"}  # Llama: else today
    batch = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, **fixed).to(DEVICE)
    ids, attn = batch["input_ids"], batch["attention_mask"]  # no position_ids: rotary ones are relative
    P, tokens, cache, alive = ids.shape[1], ids, None, torch.ones_like(attn[:, :1])
    eos = torch.tensor(model.generation_config.eos_token_id or tokenizer.eos_token_id, device=DEVICE)
    while alive.any() and ids.shape[1] < P + max_new_tokens:
        out = model(tokens, attention_mask=attn, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, probs = out.past_key_values, out.logits[:, -1].float().softmax(-1)
        probs = probs.cpu() if DEVICE == "mps" else probs  # multinomial on MPS can draw impossible tokens
        tokens = probs.argmax(-1, keepdim=True) if greedy else torch.multinomial(probs, 1)
        tokens = tokens.to(DEVICE).where(alive == 1, tokenizer.pad_token_id)
        ids, attn = torch.cat([ids, tokens], 1), torch.cat([attn, alive], 1)
        alive = alive * ~torch.isin(tokens, eos)  # attn grew first: the end-of-turn token is in the mask
    return ids, attn, attn[:, P:].float(), tokenizer.batch_decode(ids[:, P:], skip_special_tokens=True), alive


def encode_given(model, tokenizer, prompts, completions):
    """Given completions, end-of-turn token added, in place of sampled: ids, attn, mask as from sample."""
    ids, attn, *_ = sample(model, tokenizer, prompts, 0)  # no new token: the prompts alone
    ended = [completion + tokenizer.eos_token for completion in completions]
    right = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_tensors": "pt"}
    given = tokenizer(ended, **right).to(DEVICE)
    ids, attn = torch.cat([ids, given["input_ids"]], 1), torch.cat([attn, given["attention_mask"]], 1)
    return ids, attn, given["attention_mask"].float()


def completion_logp(model, ids, attn, mask):
    """Log-prob of each completion token given all before it, 0 after the end: (N, C)."""
    C = mask.shape[1]  # the last token is not fed: it predicts nothing
    logits = model(ids[:, :-1], attention_mask=attn[:, :-1], use_cache=False, logits_to_keep=C).logits.float()
    return (logits.gather(-1, ids[:, -C:, None]).squeeze(-1) - logits.logsumexp(-1)) * mask


def all_sum(tensor):
    """The tensor summed over the processes of torchrun, in place; unchanged where only one runs."""
    if WORLD > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def evaluate_gsm8k(model, tokenizer, args, test, step, phase):
    """Prints and logs strict and lenient greedy accuracy, and two completions."""
    texts, test = [], test[: args.eval_size]
    share = test[RANK::WORLD]
    for start in range(0, len(share), 64):
        questions = [question for question, _ in share[start : start + 64]]
        texts += sample(model, tokenizer, questions, args.max_new_tokens, greedy=True)[3]
        print(f"\r{phase}: {len(texts)} of {len(share)}", end="", flush=True)
    scores = [[*gsm8k_reward(solution, text).values()] for (_, solution), text in zip(share, texts)]
    right = all_sum(torch.tensor(scores, device=DEVICE).view(-1, 2).sum(0))
    p, lenient = (right / len(test)).tolist()
    w = 1.96**2 / len(test)  # z^2 / n in Wilson's interval, which also holds near 0 and 1
    low, high = ((p + w / 2 + sign * (w * p * (1 - p) + w * w / 4) ** 0.5) / (1 + w) for sign in (-1, 1))
    line = f", accuracy {p:.3f} on {len(test)} ({low:.3f} to {high:.3f} at 95 %), lenient {lenient:.3f}"
    print(line, *map(repr, texts[:2]), sep="\n  ")
    scores = {"accuracy": round(p, 3), "lenient": round(lenient, 3), "n": len(test)}
    print(json.dumps({"step": step, "phase": phase, "eval": scores}), file=args.log)


def sft_loss(logp, weights):
    """Cross-entropy: minus the weighted sum of the completions' log-probs; both (N, C)."""
    return -(logp * weights).sum()


def group_advantages(rewards, G):
    """(reward - mean) / (std + 1e-4) in each group of G: (N,) to (N, 1). 0 1 0 0: -0.5 1.5 -0.5 -0.5."""
    groups = rewards.view(-1, G)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)


def grpo_loss(logp, old_logp, ref_logp, advantages, weights, epsilon, beta):
    """Loss, metrics; log-probs, weights (N, C), advantages (N, 1); kl: k3, joschu.net/blog/kl-approx.html"""
    ratio = torch.exp(logp - old_logp)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    kl = torch.expm1(ref_logp - logp) - (ref_logp - logp)
    metrics = {"kl": (kl * weights).sum(), "clip_frac": ((surrogate < ratio * advantages) * weights).sum()}
    return -((surrogate - beta * kl) * weights).sum(), metrics


if __name__ == "__main__":
    args, history = parse_args(), []
    if WORLD > 1:
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()  # nccl for tensors on CUDA, gloo for those on the CPU
    if RANK:  # only the first process prints and saves
        sys.stdout, args.save = open(os.devnull, "w"), ""
    set_seed(args.seed * WORLD + RANK)  # prompts and samples of its own for each process
    try:  # float32, as bf16 rounds small updates away; eager on MPS, where sdpa can be nan behind padding
        kind = {"dtype": torch.float32, "attn_implementation": "eager" if DEVICE == "mps" else None}
        model = AutoModelForCausalLM.from_pretrained(args.model, **kind).to(DEVICE)
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
        tokenizer.get_chat_template()  # raises where there is none
        splits = datasets.load_dataset(args.dataset, None if os.path.isdir(args.dataset) else "main")
        train, test = ([*zip(splits[name]["question"], splits[name]["answer"])] for name in ("train", "test"))
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        what = f"--model {args.model}, --dataset {args.dataset}: {error!r:.400}"
        sys.exit(f"{what} (HF_TOKEN=... in .env? --model {TINY} --dataset {TINY_DATASET}?)")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # pad may be eos: no mask comes from ids
    facts = f"{model.num_parameters() / 1e6:.1f} M parameters, {DEVICE}, {model.dtype}, seed {args.seed}"
    data = f"{args.model}, {args.dataset} (the real ones: --model {MODEL} --dataset {DATASET})"
    print(f"gsm8k_sft_grpo.py: {data}, {facts}")
    optimizer = torch.optim.Adam(model.parameters())
    evaluate_gsm8k(model, tokenizer, args, test, 0, "base")
    try:
        for step in range(args.sft_steps):
            questions, solutions = zip(*random.choices(train, k=args.batch_size))
            texts = [re.sub("<<.*?>>", "", solution) for solution in solutions]  # the calculator's marks
            ids, attn, mask = encode_given(model, tokenizer, questions, texts)
            weights = mask / all_sum(mask.sum())  # of the whole batch: micro-batches and processes add up
            optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.sft_steps)
            optimizer.zero_grad()
            loss = torch.zeros((), device=DEVICE)
            for rows in torch.arange(len(ids)).split(args.micro_batch_size):
                part = sft_loss(completion_logp(model, ids[rows], attn[rows], mask[rows]), weights[rows])
                part.backward()
                loss += part.detach()
            for parameter in model.parameters():
                all_sum(parameter.grad)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            record = {"step": step, "phase": "sft", "loss": all_sum(loss).item()}
            print(json.dumps(record), file=args.log)
            print(f"sft step {step}  loss {record['loss']:.3f}", flush=True)
        evaluate_gsm8k(model, tokenizer, args, test, 0, "sft")
        reference = copy.deepcopy(model).requires_grad_(False) if args.beta else None
        optimizer = torch.optim.Adam(model.parameters())  # no memory of the SFT gradients
        for step in range(args.steps):
            # 1. sample
            start = time.time()
            drawn = [p for p in random.choices(train, k=args.batch_size) for _ in range(args.group_size)]
            questions, solutions = zip(*drawn)
            ids, attn, mask, texts, alive = sample(model, tokenizer, questions, args.max_new_tokens)
            # 2. reward
            rewards = torch.tensor([r["accuracy"] for r in map(gsm8k_reward, solutions, texts)]).to(DEVICE)
            # 3. advantages
            advantages = group_advantages(rewards, args.group_size)
            # 4. update
            weights = mask / all_sum(mask.sum())  # of the whole batch: micro-batches and processes add up
            optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
            old_logp, ref_logp = torch.empty_like(mask), torch.empty_like(mask)  # the first epoch fills them
            for epoch in range(args.update_epochs):
                optimizer.zero_grad()
                metrics = collections.Counter()  # its update() adds to what is there
                for rows in torch.arange(len(ids)).split(args.micro_batch_size):
                    inputs = ids[rows], attn[rows], mask[rows]
                    logp = completion_logp(model, *inputs)
                    if epoch == 0:
                        old_logp[rows] = logp.detach()  # no pass of its own: the ratio is exactly 1 here
                        ref_logp[rows] = completion_logp(reference, *inputs) if args.beta else old_logp[rows]
                    batch = logp, old_logp[rows], ref_logp[rows], advantages[rows], weights[rows]
                    loss, part = grpo_loss(*batch, args.epsilon, args.beta)
                    loss.backward()
                    metrics.update({name: metric.detach() for name, metric in part.items()})
                for parameter in model.parameters():
                    all_sum(parameter.grad)
                grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
                optimizer.step()
            # 5. report
            record = {"step": step, "reward": rewards.mean(), **{k: all_sum(v) for k, v in metrics.items()}}
            record |= {"zero_std": (advantages == 0).float().mean()}  # 1: all groups agree, none teaches
            record |= {"grad_norm": grad_norm, "finished": 1 - alive.float().mean()}
            record |= {"length": mask.sum(1).mean(), "tokens": mask.sum(), "seconds": time.time() - start}
            history.append({k: torch.as_tensor(v).item() for k, v in record.items()})
            print(json.dumps(history[-1]), file=args.log)
            print(*(f"{k} {round(v, 3):g} " for k, v in history[-1].items()), repr(texts[0])[:40], flush=True)
    except KeyboardInterrupt:
        print("Ctrl-C: evaluating and saving what has been learned; once more stops at once")
    except RuntimeError as error:  # a gradient or a weight is not finite, or memory has run out
        sys.exit(f"stopped in step {step}, nothing saved: {error}")
    evaluate_gsm8k(model, tokenizer, args, test, len(history), "grpo" if history else "sft")
    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
        print(f"saved in {args.save}")
    curve, seconds, tokens = ([round(r[key], 3) for r in history] for key in ("reward", "seconds", "tokens"))
    print("reward", "".join("▁▂▃▄▅▆▇█"[max(0, int(7.99 * x))] for x in curve), *curve[:1], "to", *curve[-1:])
    peak = torch.mps.driver_allocated_memory() if DEVICE == "mps" else torch.cuda.max_memory_allocated()
    print(f"{sum(seconds):.0f} s, {sum(tokens) / sum(seconds, 1e-9):.0f} tokens/s, GPU {peak // 2**20} MiB")
    if WORLD > 1:  # last of all: gloo's threads may abort Python's own exit, and torchrun then kills the rest
        sys.stdout.flush()
        os._exit(0)

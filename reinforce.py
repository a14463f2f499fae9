"""REINFORCE (Williams 1992, Machine Learning 8): make likelier what was rewarded above a baseline.

    advantage = reward - baseline
    objective = advantage * (sum of logp over the completion)

Baselines: none; the batch's mean; ema, a moving average of the batches before this one; scst, the reward of
the policy's own greedy completion (Rennie et al. 2016, arXiv 1612.00563). The reward is the type-token ratio,
distinct words / words, less a penalty for texts shorter than asked. Differences: gradients are clipped to
norm 1, the learning rate falls. No ratio, clip or KL: one update a batch. Run: uv run reinforce.py
"""

import argparse, functools, json, os, random, re, sys, time, dotenv, torch

dotenv.load_dotenv()  # before transformers, which reads HF_HOME and HF_HUB_OFFLINE when it is imported
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
MODEL, TINY = "meta-llama/Llama-3.2-1B-Instruct", "tests/tiny-llama"  # without a GPU TINY stands in
SYSTEM = "You write short texts in plain English."
TOPICS = """winter, music, rivers, the moon, chess, silence, summer, bread, coffee, trains, forests, mountains
gardens, dogs, cats, birds, bees, books, letters, football, cooking, school, rain, the sea, travel, clocks"""
PROMPTS = {f"Write about 40 words about {topic}.": 40 for topic in re.split(", |\n", TOPICS)}  # words wanted


def parse_args():
    """The command line, every value checked before anything is loaded; in a notebook the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = TINY if DEVICE == "cpu" and os.path.isdir(TINY) else MODEL
    flags = {"model": model, "steps": 30, "batch-size": 16, "max-new-tokens": 96, "lr": 2e-6}
    flags |= {"ema-beta": 0.9, "brevity-penalty-scale": 1.0}
    for name, default in (flags | {"seed": 0, "log": os.devnull, "save": ""}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    names = ["none", "mean", "ema", "scst"]
    parser.add_argument("--baseline", choices=names, default="mean", help="default: %(default)s")
    args = parser.parse_args([] if "ipykernel" in sys.modules else None)
    for name, value in vars(args).items():
        least, most = (0, 1) if type(value) is float else ({"group_size": 2, "seed": 0}.get(name, 1), 10**9)
        if not isinstance(value, str) and not least <= value <= most:  # neither nan nor inf is
            parser.error(f"argument --{name.replace('_', '-')}: {value} is not from {least} to {most}")
    try:
        if args.save and (os.makedirs(args.save, exist_ok=True) or os.listdir(args.save)):
            parser.error(f"argument --save: {args.save} is not empty")
        args.log = open(args.log, "w", buffering=1)
    except OSError as error:
        parser.error(f"argument --save or --log: {error}")
    return args


def lexical_reward(prompt, text, penalty_scale):
    """The reward and its parts: type-token ratio (0 without words) and number of words; don't is one."""
    words, wanted = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower()), PROMPTS[prompt]
    ttr, missing = len(set(words)) / max(1, len(words)), max(0, wanted - len(words)) / wanted
    return {"reward": ttr - penalty_scale * missing, "ttr": ttr, "words": len(words)}


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


def completion_logp(model, ids, attn, mask):
    """Log-prob of each completion token given all before it, 0 after the end: (N, C)."""
    C = mask.shape[1]  # the last token is not fed: it predicts nothing
    logits = model(ids[:, :-1], attention_mask=attn[:, :-1], use_cache=False, logits_to_keep=C).logits.float()
    return (logits.gather(-1, ids[:, -C:, None]).squeeze(-1) - logits.logsumexp(-1)) * mask


def evaluate(model, tokenizer, prompts, reward, args, step):
    """Prints and logs the mean scores of greedy completions, one for each prompt; shows the last two."""
    pairs = [*zip(prompts, sample(model, tokenizer, prompts, args.max_new_tokens, greedy=True)[3])]
    means = {k: round(sum(reward(*p)[k] for p in pairs) / len(pairs), 3) for k in reward(*pairs[0])}
    print(f"{'after' if step else 'before'}: {len(pairs)} prompts", means, *pairs[-2:], sep="\n  ")
    print(json.dumps({"step": step, "eval": means}), file=args.log)


def ema_baseline(rewards, beta):
    """Moving average of earlier batches' mean rewards, each weighing beta times the next; 0 without any."""
    weights = [beta**age for age in reversed(range(len(rewards)))]
    return sum(w * r for w, r in zip(weights, rewards)) / (sum(weights) or 1)


def policy_gradient_loss(logp, advantages):
    """-(advantage * summed log-prob), averaged over completions; logp (N, C), advantages (N, 1)."""
    return -(advantages * logp).sum(1).mean()


if __name__ == "__main__":
    args, history = parse_args(), []
    set_seed(args.seed)
    try:  # float32, as bf16 rounds small updates away; eager on MPS, where sdpa can be nan behind padding
        kind = {"dtype": torch.float32, "attn_implementation": "eager" if DEVICE == "mps" else None}
        model = AutoModelForCausalLM.from_pretrained(args.model, **kind).to(DEVICE)
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
        tokenizer.get_chat_template()  # raises where there is none
    except (OSError, ValueError) as error:
        sys.exit(f"--model {args.model}: {error!r:.400} (HF_TOKEN=... in .env? --model {TINY}?)")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # pad may be eos: no mask comes from ids
    facts = f"{model.num_parameters() / 1e6:.1f} M parameters, {DEVICE}, {model.dtype}, seed {args.seed}"
    print(f"reinforce.py: {args.model} (the real one: --model {MODEL}), {facts}")
    optimizer = torch.optim.Adam(model.parameters())
    reward = functools.partial(lexical_reward, penalty_scale=args.brevity_penalty_scale)
    train, test = [*PROMPTS][6:], [*PROMPTS][:6]
    evaluate(model, tokenizer, test, reward, args, 0)
    try:
        for step in range(args.steps):
            # 1. sample
            start = time.time()
            prompts = random.choices(train, k=args.batch_size)
            ids, attn, mask, texts, alive = sample(model, tokenizer, prompts, args.max_new_tokens)
            # 2. reward
            rewards, *parts = torch.tensor([[*r.values()] for r in map(reward, prompts, texts)]).to(DEVICE).T
            metrics = {"ttr": parts[0].mean(), "words": parts[1].mean()}
            # 3. advantages
            baseline = 0.0
            if args.baseline == "mean":
                baseline = rewards.mean()
            elif args.baseline == "ema":
                baseline = ema_baseline([record["reward"] for record in history], args.ema_beta)
            elif args.baseline == "scst":
                greedy = sample(model, tokenizer, prompts, args.max_new_tokens, greedy=True)[3]
                baseline = torch.tensor([r["reward"] for r in map(reward, prompts, greedy)]).to(DEVICE)
            advantages = (rewards - baseline)[:, None]
            # 4. update
            optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
            loss = policy_gradient_loss(completion_logp(model, ids, attn, mask), advantages)  # the ratio is 1
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            # 5. report
            record = {"step": step, "reward": rewards.mean(), **metrics}
            record |= {"grad_norm": grad_norm, "finished": 1 - alive.float().mean()}
            record |= {"length": mask.sum(1).mean(), "tokens": mask.sum(), "seconds": time.time() - start}
            history.append({k: torch.as_tensor(v).item() for k, v in record.items()})
            print(json.dumps(history[-1]), file=args.log)
            print(*(f"{k} {round(v, 3):g} " for k, v in history[-1].items()), repr(texts[0])[:40], flush=True)
    except KeyboardInterrupt:
        print("Ctrl-C: evaluating and saving what has been learned; once more stops at once")
    except RuntimeError as error:  # a gradient or a weight is not finite, or memory has run out
        sys.exit(f"stopped in step {step}, nothing saved: {error}")
    evaluate(model, tokenizer, test, reward, args, len(history))
    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
        print(f"saved in {args.save}")
    curve, seconds, tokens = ([round(r[key], 3) for r in history] for key in ("reward", "seconds", "tokens"))
    print("reward", "".join("▁▂▃▄▅▆▇█"[max(0, int(7.99 * x))] for x in curve), *curve[:1], "to", *curve[-1:])
    peak = torch.mps.driver_allocated_memory() if DEVICE == "mps" else torch.cuda.max_memory_allocated()
    print(f"{sum(seconds):.0f} s, {sum(tokens) / sum(seconds, 1e-9):.0f} tokens/s, GPU {peak // 2**20} MiB")

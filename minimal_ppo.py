"""PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7, 9): a critic tells which tokens beat expectation.

    advantage[t] = delta[t] + gamma*lam * advantage[t+1], delta[t] = reward[t] + gamma * value[t+1] - value[t]
    surrogate = min(ratio * advantage, clip(ratio, 1 ± epsilon) * advantage), ratio = exp(logp - old_logp)
    objective = surrogate - (value - return)^2 / 2, return[t] = advantage[t] + value[t] before whitening

Differences: no entropy bonus, no minibatches, whitening, the policy's rate falls. Run: uv run minimal_ppo.py
"""

import argparse, copy, json, os, random, sys, time, dotenv, torch

dotenv.load_dotenv()  # before transformers, which reads HF_HOME and HF_HUB_OFFLINE when it is imported
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
MODEL, TINY = "Qwen/Qwen2.5-0.5B-Instruct", "tests/tiny-qwen"  # without a GPU TINY stands in for MODEL
SYSTEM = "Work out the sum. Give the result between <answer> and </answer>."
SUMS = {f"What is {a} + {b}?": a + b for a in range(10) for b in range(10)}


def parse_args():
    """The command line, every value checked before anything is loaded; in a notebook the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = TINY if DEVICE == "cpu" and os.path.isdir(TINY) else MODEL
    flags = {"model": model, "steps": 30, "batch-size": 8, "group-size": 8, "max-new-tokens": 48, "lr": 5e-6}
    flags |= {"update-epochs": 2, "epsilon": 0.2, "beta": 0.05, "gamma": 1.0, "lam": 0.95, "critic-lr": 1e-5}
    for name, default in (flags | {"seed": 0, "log": os.devnull, "save": ""}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    args = parser.parse_args([] if "ipykernel" in sys.modules else None)
    for name, value in vars(args).items():
        least, most = (0, 1) if type(value) is float else ({"seed": 0}.get(name, 1), 10**9)
        if not isinstance(value, str) and not least <= value <= most:  # neither nan nor inf is
            parser.error(f"argument --{name.replace('_', '-')}: {value} is not from {least} to {most}")
    try:
        if args.save and (os.makedirs(args.save, exist_ok=True) or os.listdir(args.save)):
            parser.error(f"argument --save: {args.save} is not empty")
        args.log = open(args.log, "w", buffering=1)
    except OSError as error:
        parser.error(f"argument --save or --log: {error}")
    return args


def sum_reward(prompt, text):
    """Accuracy: 1.0 for exactly one pair of answer tags with exactly the prompt's sum in it, else 0.0."""
    return {"accuracy": float(text.count("answer>") == 2 and f"<answer>{SUMS[prompt]}</answer>" in text)}


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


def critic_values(critic, ids, attn, mask):
    """The critic's value of the text before each completion token, 0 after the end: (N, C)."""
    return critic(ids, attention_mask=attn, use_cache=False).logits[:, -mask.shape[1] - 1 : -1, 0] * mask


def gae(rewards, values, gamma, lam):
    """GAE (1506.02438, eq. 16): advantages, returns; rewards and values are 0 after the end; all (N, C)."""
    advantages = rewards + gamma * torch.nn.functional.pad(values, (-1, 1)) - values  # the deltas, so far
    for t in reversed(range(values.shape[1] - 1)):
        advantages[:, t] += gamma * lam * advantages[:, t + 1]
    return advantages, advantages + values


def ppo_loss(logp, old_logp, advantages, values, returns, weights, epsilon):
    """The losses of policy and critic, added, and their metrics; all tensors (N, C)."""
    ratio = torch.exp(logp - old_logp)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    value_loss = 0.5 * ((values - returns) ** 2 * weights).sum()
    metrics = {"value_loss": value_loss, "clip_frac": ((surrogate < ratio * advantages) * weights).sum()}
    return -((surrogate * weights).sum() - value_loss), metrics


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
    print(f"minimal_ppo.py: {args.model} (the real one: --model {MODEL}), {facts}")
    reference = copy.deepcopy(model).requires_grad_(False) if args.beta else None
    critic = copy.deepcopy(model)  # its head, untied from the embeddings, starts at 0, and so do the values
    critic.lm_head.weight = torch.nn.Parameter(torch.zeros(1, model.config.hidden_size, device=DEVICE))
    optimizer = torch.optim.Adam([{"params": m.parameters()} for m in (model, critic)], lr=args.critic_lr)
    reward, train, test = sum_reward, [*SUMS], [*SUMS]  # none held out: the form is learned, not sums
    evaluate(model, tokenizer, test, reward, args, 0)
    try:
        for step in range(args.steps):
            # 1. sample
            start = time.time()
            prompts = [q for q in random.choices(train, k=args.batch_size) for _ in range(args.group_size)]
            ids, attn, mask, texts, alive = sample(model, tokenizer, prompts, args.max_new_tokens)
            # 2. reward
            rewards = torch.tensor([r["accuracy"] for r in map(reward, prompts, texts)]).to(DEVICE)
            # 3. advantages
            old_logp = completion_logp(model, ids, attn, mask).detach()  # already now: the rewards need it
            kl = old_logp - (completion_logp(reference, ids, attn, mask) if args.beta else old_logp)
            token_rewards = -args.beta * kl  # each token pays for its distance (InstructGPT, 2203.02155)
            token_rewards[range(len(mask)), mask.sum(1).long() - 1] += rewards  # also where it was cut off
            old_values = critic_values(critic, ids, attn, mask).detach()
            advantages, returns = gae(token_rewards, old_values, args.gamma, args.lam)
            advantages = (advantages - advantages[mask == 1].mean()) / (advantages[mask == 1].std() + 1e-4)
            # 4. update
            weights = mask / mask.sum()  # a weighted sum is the mean over all tokens of the batch
            optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
            for epoch in range(args.update_epochs):
                logp, values = completion_logp(model, ids, attn, mask), critic_values(critic, ids, attn, mask)
                loss, metrics = ppo_loss(logp, old_logp, advantages, values, returns, weights, args.epsilon)
                optimizer.zero_grad()
                loss.backward()
                grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
                torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0, error_if_nonfinite=True)
                optimizer.step()
            # 5. report
            record = {"step": step, "reward": rewards.mean(), "kl": (kl * weights).sum(), **metrics}
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

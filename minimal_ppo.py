# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "transformers>=4.56.2", "python-dotenv>=1.0"]
# ///
"""PPO: reinforce each token that turned out better than a critic had expected.

    token reward = -beta * (old_logp - ref_logp), plus the completion's reward on its last token
    delta[t] = token reward[t] + gamma * value[t + 1] - value[t]
    advantage[t] = delta[t] + gamma * lam * advantage[t + 1]
    return[t] = advantage[t] + value[t]; then the advantages are normalized over the batch
    ratio = exp(logp - old_logp)
    surrogate = min(ratio * advantage, clip(ratio, 1 - epsilon, 1 + epsilon) * advantage)
    loss = mean over all completion tokens of (-surrogate + (value - return)^2 / 2)

Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347, eq. 7 and 9) with GAE (1506.02438,
eq. 16) and the KL penalty in the reward (InstructGPT, 2203.02155). No entropy bonus, no minibatches.
"""

import copy, json, os, random
from dataclasses import dataclass

import dotenv, torch

dotenv.load_dotenv()  # a file .env may set HF_TOKEN and HF_HOME, before transformers reads them
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
if DEVICE == "cpu" and os.path.isdir("tests/tiny-qwen"):
    MODEL = "tests/tiny-qwen"  # bundled: 0.9M parameters, for this task only; another needs a real model


@dataclass
class Args:
    model: str = HfArg(default=MODEL, help="Hub id or folder of an instruct model")
    steps: int = HfArg(default=30, help="training steps, one batch each")
    batch_size: int = HfArg(default=64, help="prompts per step, with one completion each")
    max_new_tokens: int = HfArg(default=48, help="longer completions are cut off")
    lr: float = HfArg(default=1e-6, help="learning rate of the first step; it falls linearly to 0")
    update_epochs: int = HfArg(default=2, help="optimizer updates per batch")
    epsilon: float = HfArg(default=0.2, help="clip range of the ratio")
    beta: float = HfArg(default=0.05, help="weight of the KL penalty; 0 drops the reference model")
    gamma: float = HfArg(default=1.0, help="discount per token")
    lam: float = HfArg(default=0.95, help="lambda of GAE: 0 looks one token ahead, 1 to the end")
    critic_lr: float = HfArg(default=1e-5, help="learning rate of the critic; it stays constant")
    seed: int = HfArg(default=0, help="on a CPU, the same seed gives the same numbers")
    log: str = HfArg(default=os.devnull, help="file for JSON lines, one per step and evaluation")
    save: str = HfArg(default="", help="folder for the trained model and its tokenizer")


# The task. For another one, change this block, and --max-new-tokens if its answers are longer.
SYSTEM = "Work out the sum. Give the result in XML tags."  # it learns <answer>; <result> is common at first
TRAIN = [(f"What is {a} + {b}?", a + b) for a in range(10) for b in range(10)]  # (prompt, answer)
TEST = TRAIN  # nothing is held out: the model can already add, and only has to learn the tags


def score(text, answer):
    """1 for exactly one pair of answer tags with exactly the answer in it, else 0."""
    one_pair = text.count("answer>") == 2  # once in <answer>, once in </answer>
    return {"reward": float(one_pair and f"<answer>{answer}</answer>" in text)}


def encode_prompts(tokenizer, prompts):
    """SYSTEM and each prompt as a chat, padded on the left: ids and attn, both (N, P)."""
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": p}] for p in prompts]
    options = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
    # Otherwise Qwen3 would think first, and Llama 3.2 would write today's date into the prompt.
    template = {"enable_thinking": False, "date_string": "26 Jul 2024"}
    batch = tokenizer.apply_chat_template(chats, **options, **template).to(DEVICE)
    return batch["input_ids"], batch["attention_mask"]


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new_tokens, greedy=False):
    """One completion per prompt, at temperature 1 or greedy: texts, ids, attn, mask, finished.

    ids and attn (N, P+C): prompts padded on the left, completions on the right. mask (N, C): 1 on
    each completion token, the end-of-turn token included. finished (N, 1): False if it was cut off.
    """
    ids, attn = encode_prompts(tokenizer, prompts)
    P = ids.shape[1]
    eos = torch.tensor(model.generation_config.eos_token_id or tokenizer.eos_token_id).to(DEVICE)
    running = torch.ones_like(ids[:, :1], dtype=torch.bool)
    cache = DynamicCache(config=model.config)  # the model adds to it
    tokens = ids  # the first pass reads the prompts, each later one only the newest tokens
    while running.any() and ids.shape[1] < P + max_new_tokens:
        # No position ids: rotary attention reads only distances, and left padding keeps those.
        out = model(tokens, attn, None, cache, use_cache=True, logits_to_keep=1)
        probs = out.logits[:, -1].float().softmax(-1)  # temperature 1, as in completion_logp
        if DEVICE == "mps":
            probs = probs.cpu()  # there, multinomial can draw impossible tokens
        tokens = probs.argmax(-1, keepdim=True) if greedy else torch.multinomial(probs, 1)
        tokens = tokens.to(DEVICE).where(running, tokenizer.pad_token_id)
        ids = torch.cat([ids, tokens], 1)
        attn = torch.cat([attn, running], 1)  # running is still True at an end-of-turn token
        running = running & ~torch.isin(tokens, eos)
    texts = tokenizer.batch_decode(ids[:, P:], skip_special_tokens=True)
    return texts, ids, attn, attn[:, P:].float(), ~running


def completion_logp(model, ids, attn, mask):
    """Log-prob of each completion token given all tokens before it, 0 after the end: (N, C)."""
    C = mask.shape[1]  # each position predicts the next token, so the last token is left out
    out = model(ids[:, :-1], attention_mask=attn[:, :-1], use_cache=False, logits_to_keep=C)
    logp = out.logits.float().log_softmax(-1)
    return logp.gather(-1, ids[:, -C:].unsqueeze(-1)).squeeze(-1) * mask


def mean_scores(scores):
    """The mean of each number that score returns."""
    return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}


def format_numbers(record):
    """{"step": 3, "reward": 0.25} becomes "step 3  reward 0.25"."""
    return "  ".join(f"{name} {value:.4g}" for name, value in record.items())


def evaluate(model, tokenizer, args, log, step):
    """Sample a completion of each prompt in TEST, print and log the mean scores, print the last text."""
    prompts, answers = zip(*TEST)
    texts, *_ = sample(model, tokenizer, prompts, args.max_new_tokens)
    means = mean_scores([score(text, answer) for text, answer in zip(texts, answers)])
    print(f"after {step} steps, sampled, {len(TEST)} prompts: {format_numbers(means)}")
    print(f"    {prompts[-1]!a} -> {texts[-1]!a}", flush=True)
    print(json.dumps({"step": step, "eval": means}), file=log)


def critic_values(critic, ids, attn, mask):
    """The critic's estimate, before each completion token, of the reward still to come: (N, C)."""
    out = critic(ids[:, :-1], attention_mask=attn[:, :-1], use_cache=False, logits_to_keep=mask.shape[1])
    return out.logits.float().squeeze(-1) * mask


def gae(rewards, values, gamma, lam):
    """Advantages and returns, all (N, C). The value after the last token is 0, even if it was cut off."""
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        next_advantage = advantages[:, t]
    return advantages, advantages + values


def ppo_loss(logp, old_logp, advantages, values, returns, epsilon):
    """Loss of each token, of policy and critic together, and metrics: all (N, C)."""
    ratio = torch.exp(logp - old_logp)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    value_loss = (values - returns) ** 2 / 2  # no coefficient: policy and critic share no weight
    metrics = {"clip_frac": surrogate < ratio * advantages}  # tokens whose gradient the clip stops
    metrics["value_loss"] = value_loss.detach()
    return -surrogate + value_loss, metrics


if __name__ == "__main__":
    args = HfArgumentParser(Args).parse_args(None if "__file__" in globals() else [])  # [] in a notebook
    set_seed(args.seed)
    # float32, because bf16 would round such small updates away. from_pretrained turns dropout off.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE)
    if DEVICE == "mps":
        model.set_attn_implementation("eager")  # sdpa can return nan for left-padded rows there
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masks are not made from ids
    log = open(args.log, "w", buffering=1)
    os.makedirs(args.save or ".", exist_ok=True)  # now, so that a bad path fails before training
    size = model.num_parameters()
    print(f"--model {args.model}: {size:,} parameters on {DEVICE}, seed {args.seed}", flush=True)
    evaluate(model, tokenizer, args, log, 0)

    reference = copy.deepcopy(model).requires_grad_(False) if args.beta else None
    critic = copy.deepcopy(model)
    # One output in place of the vocabulary: the value. It starts at 0, so rewards should be of size 1 or so.
    critic.lm_head.weight = torch.nn.Parameter(torch.zeros_like(critic.lm_head.weight[:1]))
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr)
    history = []
    for step in range(args.steps):
        # 1. sample
        examples = random.choices(TRAIN, k=args.batch_size)
        prompts, answers = zip(*examples)
        texts, ids, attn, mask, finished = sample(model, tokenizer, prompts, args.max_new_tokens)

        # 2. reward
        scores = [score(text, answer) for text, answer in zip(texts, answers)]
        rewards = torch.tensor([s["reward"] for s in scores], dtype=torch.float32, device=DEVICE)

        # 3. advantage
        with torch.no_grad():
            old_logp = completion_logp(model, ids, attn, mask)  # not from sampling, which rounds differently
            ref_logp = completion_logp(reference, ids, attn, mask) if args.beta else old_logp
            old_values = critic_values(critic, ids, attn, mask)
        kl = old_logp - ref_logp  # its expectation is the KL divergence; a single one may be negative
        token_rewards = -args.beta * kl
        token_rewards[torch.arange(len(ids)), mask.sum(1).long() - 1] += rewards  # at the last token
        advantages, returns = gae(token_rewards, old_values, args.gamma, args.lam)
        real = advantages[mask == 1]
        advantages = (advantages - real.mean()) / (real.std(correction=0) + 1e-4)

        # 4. update
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        for epoch in range(args.update_epochs):
            logp = completion_logp(model, ids, attn, mask)
            values = critic_values(critic, ids, attn, mask)
            token_loss, metrics = ppo_loss(logp, old_logp, advantages, values, returns, args.epsilon)
            loss = (token_loss * mask).sum() / mask.sum()
            optimizer.zero_grad()
            critic_optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            critic_optimizer.step()

        # 5. report: metrics of the last update, grad_norm before clipping
        if args.beta:
            metrics["kl"] = kl  # at sampling time
        metrics = {name: ((value * mask).sum() / mask.sum()).item() for name, value in metrics.items()}
        metrics["grad_norm"] = grad_norm.item()
        metrics["tokens"] = mask.sum(1).mean().item()
        metrics["finished"] = finished.float().mean().item()
        record = dict(step=step, **mean_scores(scores), **metrics)  # score must not reuse these names
        history.append(record)
        print(f"{format_numbers(record)}  {texts[0][-40:]!a}", flush=True)
        samples = [dict(prompt=p, text=t, **s) for p, t, s in zip(prompts, texts, scores)]
        print(json.dumps(record | {"samples": samples}), file=log)

    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
    evaluate(model, tokenizer, args, log, len(history))

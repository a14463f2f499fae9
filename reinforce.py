# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "transformers>=4.56.2", "python-dotenv>=1.0"]
# ///
"""REINFORCE: reinforce completions that score above a baseline.

    advantage = reward - baseline
    loss = mean over completions of -advantage * (logp summed over the completion)

Williams 1992 (Machine Learning 8). The baselines, chosen with --baseline:
- none: 0, so every completion with a positive reward is reinforced, better ones more strongly.
- mean: the mean reward of the batch. It contains the completion's own reward, which only scales the
  expected gradient, by 1 - 1 / batch size.
- ema: a moving average of the mean rewards of earlier batches.
- scst: the reward of the policy's own greedy completion (Rennie et al. 2016, arXiv 1612.00563).
Notes:
- There is one update per batch, so there is no ratio to clip. The learning rate falls linearly to 0.
- Adam, and clipping to norm 1 in nearly every step, make a constant factor in the loss irrelevant.
"""

import json, os, random, re, sys
from dataclasses import dataclass
from typing import Literal

import dotenv
import torch

dotenv.load_dotenv()  # HF_TOKEN and HF_HOME must be set before transformers is imported
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
DRAW_ON = "cpu" if DEVICE == "mps" else DEVICE  # on MPS, multinomial can draw impossible tokens
MODEL = "meta-llama/Llama-3.2-1B-Instruct"
if DEVICE == "cpu" and os.path.isdir("tests/tiny-llama"):
    MODEL = "tests/tiny-llama"  # bundled: 0.9M parameters that know only these tasks


@dataclass
class Args:
    model: str = HfArg(default=MODEL, help="Hub id or folder of an instruct model")
    steps: int = HfArg(default=30, help="training steps, one batch each")
    batch_size: int = HfArg(default=16, help="prompts per step")
    max_new_tokens: int = HfArg(default=96, help="longer completions are cut off")
    lr: float = HfArg(default=2e-6, help="learning rate of the first step; it falls linearly to 0")
    baseline: Literal["none", "mean", "ema", "scst"] = HfArg(default="mean", help="subtracted from rewards")
    ema_beta: float = HfArg(default=0.9, help="ema: weight of each batch, relative to the next")
    brevity_penalty_scale: float = HfArg(default=1.0, help="weight of the penalty for missing words")
    seed: int = HfArg(default=0, help="on a CPU, the same seed gives the same numbers")
    log: str = HfArg(default=os.devnull, help="file for JSON lines, one per step and evaluation")
    save: str = HfArg(default="", help="folder for the trained model and its tokenizer")


# The smallest value allowed for each flag; nan is refused, too.
LEAST = dict(steps=1, batch_size=2, max_new_tokens=1, lr=0, ema_beta=0, brevity_penalty_scale=0)
args = Args()  # score reads it; the command line replaces it

# The task. For another one, change this block, and --max-new-tokens if its answers are longer.
# Of the numbers that score returns, "reward" is trained; any others are only reported.
SYSTEM = "You write short texts in plain English."
TOPICS = (
    "winter, music, rivers, the moon, chess, silence, summer, bread, coffee, trains, forests, mountains, "
    "gardens, dogs, cats, birds, bees, books, letters, football, cooking, school, rain, the sea, travel, "
    "clocks"
)
PROMPTS = [f"Write about 40 words about {topic}." for topic in TOPICS.split(", ")]
TRAIN = [(prompt, 40) for prompt in PROMPTS[6:]]  # (prompt, number of words asked for)
TEST = [(prompt, 40) for prompt in PROMPTS[:6]]


def score(text, answer):
    """Type-token ratio (distinct words / words), minus a penalty for every missing word."""
    words = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())  # "don't" is one word
    ttr = len(set(words)) / max(1, len(words))
    missing = max(0, answer - len(words)) / answer
    return {"reward": ttr - args.brevity_penalty_scale * missing, "ttr": ttr, "words": len(words)}


def encode_prompts(tokenizer, prompts):
    """SYSTEM and each prompt as a chat, padded on the left: ids and attn, both (N, P)."""
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": p}] for p in prompts]
    options = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
    # Otherwise Qwen3 would think first, and Llama 3.2 would write today's date into the prompt.
    options |= {"enable_thinking": False, "date_string": "26 Jul 2024"}
    batch = tokenizer.apply_chat_template(chats, **options).to(DEVICE)
    return batch["input_ids"], batch["attention_mask"]  # no position_ids: rotary ones are relative


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new_tokens, greedy=False):
    """One completion per prompt, at temperature 1 or greedy: texts, ids, attn, mask, finished.

    ids and attn (N, P+C): prompts padded on the left, completions on the right. mask (N, C): 1 on each
    completion token, the end-of-turn token included. finished (N, 1): False if max_new_tokens cut it off.
    To train at another temperature, divide the logits by it here and in completion_logp.
    """
    ids, attn = encode_prompts(tokenizer, prompts)
    P = ids.shape[1]
    eos = torch.tensor(model.generation_config.eos_token_id or tokenizer.eos_token_id, device=DEVICE)
    running = torch.ones_like(ids[:, :1], dtype=torch.bool)
    tokens = ids  # the first pass reads the prompts, each later one only the newest tokens
    cache = None
    while running.any() and ids.shape[1] < P + max_new_tokens:
        out = model(tokens, attention_mask=attn, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        probs = out.logits[:, -1].float().softmax(-1).to(DRAW_ON)
        tokens = probs.argmax(-1, keepdim=True) if greedy else torch.multinomial(probs, 1)
        tokens = tokens.to(DEVICE).where(running, tokenizer.pad_token_id)
        ids = torch.cat([ids, tokens], 1)
        attn = torch.cat([attn, running], 1)  # the end-of-turn token still counts
        running = running & ~torch.isin(tokens, eos)
    texts = tokenizer.batch_decode(ids[:, P:], skip_special_tokens=True)
    return texts, ids, attn, attn[:, P:].float(), ~running


def completion_logp(model, ids, attn, mask):
    """Log-prob of each completion token given all tokens before it, 0 after the end: (N, C)."""
    C = mask.shape[1]  # each position predicts the next token, so the last token is not fed
    out = model(ids[:, :-1], attention_mask=attn[:, :-1], use_cache=False, logits_to_keep=C)
    logits = out.logits.float()
    token_logits = logits.gather(-1, ids[:, -C:].unsqueeze(-1)).squeeze(-1)
    return (token_logits - logits.logsumexp(-1)) * mask  # log-softmax without another (N, C, V) tensor


def mean_scores(scores):
    """The mean of each number that score returns; it must return the same names every time."""
    names = dict.fromkeys(name for s in scores for name in s)
    return {name: sum(s[name] for s in scores) / len(scores) for name in names}


def format_numbers(record):
    """{"step": 3, "reward": 0.25} becomes "step 3  reward 0.25"."""
    return "  ".join(f"{name} {value:.4g}" for name, value in record.items())


def evaluate(model, tokenizer, args, log, step):
    """Print and log the mean scores of one greedy completion per prompt in TEST, and print the last."""
    prompts, answers = zip(*TEST)
    texts, *_ = sample(model, tokenizer, prompts, args.max_new_tokens, greedy=True)
    means = mean_scores([score(text, answer) for text, answer in zip(texts, answers)])
    print(f"after {step} steps, greedy, {len(TEST)} prompts: {format_numbers(means)}")
    print(f"    {prompts[-1]!r} -> {texts[-1]!r}", flush=True)
    print(json.dumps({"step": step, "eval": means}), file=log)


def ema_baseline(rewards, ema_beta):
    """Weighted mean of earlier batches' rewards: each weighs ema_beta times the next. 0 at first."""
    weights = [ema_beta**age for age in reversed(range(len(rewards)))]
    weighted = [weight * reward for weight, reward in zip(weights, rewards)]
    return sum(weighted) / (sum(weights) or 1)


def policy_gradient_loss(logp, advantages):
    """The loss, from advantages (N, 1) and log-probs (N, C) that are 0 after the end."""
    return -(advantages * logp).sum(1).mean()


if __name__ == "__main__":
    parser = HfArgumentParser(Args)
    args = parser.parse_args(None if "__file__" in globals() else [])  # no flags in a notebook cell
    for name, least in LEAST.items():
        if not getattr(args, name) >= least:
            parser.error(f"--{name} must be at least {least}")
    set_seed(args.seed)
    try:
        # float32, because in bf16, the default of transformers 5, small updates are rounded away.
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE)
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
        log = open(args.log, "w", buffering=1)
        if args.save:
            os.makedirs(args.save, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"--model {args.model}, --log or --save: {error}")
    if DEVICE == "mps":
        model.set_attn_implementation("eager")  # sdpa can return nan for left-padded rows there
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # no mask is made from ids
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    print(f"model {args.model}: {model.num_parameters():,} parameters on {DEVICE}, seed {args.seed}")
    evaluate(model, tokenizer, args, log, 0)

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
        baseline = 0.0
        if args.baseline == "mean":
            baseline = rewards.mean()
        elif args.baseline == "ema":
            baseline = ema_baseline([record["reward"] for record in history], args.ema_beta)
        elif args.baseline == "scst":
            greedy_texts, *_ = sample(model, tokenizer, prompts, args.max_new_tokens, greedy=True)
            greedy_scores = [score(text, answer) for text, answer in zip(greedy_texts, answers)]
            greedy_rewards = [s["reward"] for s in greedy_scores]
            baseline = torch.tensor(greedy_rewards, dtype=torch.float32, device=DEVICE)
        advantages = (rewards - baseline).unsqueeze(1)

        # 4. update
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        logp = completion_logp(model, ids, attn, mask)
        loss = policy_gradient_loss(logp, advantages)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()

        # 5. report: grad_norm is before clipping
        metrics = {"grad_norm": grad_norm.item()}
        metrics["tokens"] = mask.sum(1).mean().item()
        metrics["finished"] = finished.float().mean().item()
        record = dict(step=step, **mean_scores(scores), **metrics)  # names must differ
        history.append(record)
        print(f"{format_numbers(record)}  {texts[0][:40]!r}", flush=True)
        samples = [dict(prompt=p, text=t, **s) for p, t, s in zip(prompts, texts, scores)]
        print(json.dumps(record | {"samples": samples}), file=log)

    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
    evaluate(model, tokenizer, args, log, len(history))

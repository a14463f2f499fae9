# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "transformers>=4.56.2", "datasets>=4.7", "python-dotenv>=1.0"]
# ///
"""SFT, then GRPO on GSM8K: imitate a few solutions, then reinforce the better ones of a group.

    SFT loss = mean over all completion tokens of -logp
    advantage = (reward - group mean) / (group std + 1e-4)
    ratio = exp(logp - old_logp)
    surrogate = min(ratio * advantage, clip(ratio, 1 - epsilon, 1 + epsilon) * advantage)
    kl = exp(ref_logp - logp) - (ref_logp - logp) - 1
    loss = mean over all completion tokens of (-surrogate + beta * kl)

DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), eq. 3 and 4. The task is GSM8K, grade-school word
problems (Cobbe et al. 2021, 2110.14168). Differences:
- The mean is over tokens, not over completions, so that a token weighs the same in a long answer as in
  a short one (DAPO, 2503.14476).
- By default there are two updates per batch: in the first every ratio is 1, so it cannot be clipped.
- The reference stays the model after SFT: the initial one would pull the policy back to before SFT.
  The learning rate falls linearly to 0 in each phase, and GRPO starts with a fresh optimizer.
- Adam, and clipping to norm 1 in nearly every step, make a constant factor in the loss irrelevant.
- A batch passes through the model in micro-batches, which saves memory and changes nothing else.
"""

import copy, json, os, random, re, signal, sys, threading
from dataclasses import dataclass

import dotenv
import torch

dotenv.load_dotenv()  # HF_TOKEN and HF_HOME must be set before transformers is imported
import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
DRAW_ON = "cpu" if DEVICE == "mps" else DEVICE  # on MPS, multinomial can draw impossible tokens
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
DATASET = "openai/gsm8k"
if DEVICE == "cpu" and os.path.isdir("tests/tiny-qwen"):
    MODEL = "tests/tiny-qwen"  # bundled: 0.9M parameters that know only these tasks
    DATASET = "tests/tiny-gsm8k"  # 1,000 made-up problems in the style of GSM8K


@dataclass
class Args:
    model: str = HfArg(default=MODEL, help="Hub id or folder of an instruct model")
    dataset: str = HfArg(default=DATASET, help="Hub id or folder, laid out like GSM8K")
    sft_steps: int = HfArg(default=3, help="training steps of the SFT phase")
    steps: int = HfArg(default=30, help="training steps of the GRPO phase, one batch each")
    batch_size: int = HfArg(default=4, help="prompts per step")
    group_size: int = HfArg(default=8, help="completions per prompt")
    micro_batch_size: int = HfArg(default=2, help="completions per backward pass")
    max_new_tokens: int = HfArg(default=256, help="longer completions are cut off")
    lr: float = HfArg(default=2e-6, help="learning rate of the first step; it falls linearly to 0")
    update_epochs: int = HfArg(default=2, help="optimizer updates per batch")
    epsilon: float = HfArg(default=0.2, help="clip range of the ratio")
    beta: float = HfArg(default=0.04, help="weight of the KL penalty; 0 drops the reference model")
    eval_size: int = HfArg(default=1319, help="test problems per evaluation, at most")
    seed: int = HfArg(default=0, help="on a CPU, the same seed gives the same numbers")
    log: str = HfArg(default=os.devnull, help="file for JSON lines, one per step and evaluation")
    save: str = HfArg(default="", help="folder for the trained model and its tokenizer")


# The smallest value allowed for each flag; nan is refused, too.
LEAST = dict(steps=1, batch_size=1, group_size=2, micro_batch_size=1, max_new_tokens=1, update_epochs=1)
LEAST |= dict(lr=0, epsilon=0, beta=0, eval_size=1, sft_steps=1)

# The task. For another one, change this block, and below the two lines that load TRAIN and TEST.
# Of the numbers that score returns, "reward" is trained; any others are only reported.
SYSTEM = "Solve the problem step by step. End with a last line of the form: #### <number>"


def load_gsm8k(dataset, split):
    """A list of (problem, solution), without calculator annotations such as <<3+4=7>>."""
    rows = datasets.load_dataset(dataset, None if os.path.isdir(dataset) else "main", split=split)
    return [(row["question"], re.sub("<<.*?>>", "", row["answer"])) for row in rows]


def numbers(text):
    """All numbers of a text: -$1,234.50 is one; 20-5, 3/4 and 10^3 are two each."""
    found = re.findall(r"(?<![\d.])(?:-\$?|\$-?)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)", text)
    return [float(number.replace("$", "").replace(",", "")) for number in found]


def score(text, answer):
    """reward: 1 if the first line of text after the last #### has the right number and no other, else 0.

    lenient: 1 if the last number of the completion is right, with or without ####, else 0.
    """
    gold = numbers(answer)[-1]
    end = text.split("####")[-1].strip()
    strict = "####" in text and numbers(end.split("\n")[0]) == [gold]
    lenient = numbers(text)[-1:] == [gold]
    return {"reward": float(strict), "lenient": float(lenient)}


def encode_prompts(tokenizer, prompts):
    """SYSTEM and each prompt as a chat, padded on the left: ids and attn, both (N, P)."""
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": p}] for p in prompts]
    options = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
    # Otherwise Qwen3 would think first, and Llama 3.2 would write today's date into the prompt.
    options |= {"enable_thinking": False, "date_string": "26 Jul 2024"}
    batch = tokenizer.apply_chat_template(chats, **options).to(DEVICE)
    return batch["input_ids"], batch["attention_mask"]  # no position_ids: rotary ones are relative


def encode_completions(tokenizer, prompts, completions):
    """Prompts with given completions, laid out as by sample: ids and attn (N, P+C), mask (N, C)."""
    prompt_ids, prompt_attn = encode_prompts(tokenizer, prompts)
    # eos_token is the end-of-turn token of Qwen's and Llama's instruct models, but not of Gemma's.
    ended = [completion + tokenizer.eos_token for completion in completions]
    options = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_tensors": "pt"}
    batch = tokenizer(ended, **options).to(DEVICE)
    ids = torch.cat([prompt_ids, batch["input_ids"]], 1)
    attn = torch.cat([prompt_attn, batch["attention_mask"]], 1)
    return ids, attn, batch["attention_mask"].float()


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


def wilson_interval(share, n):
    """95% confidence interval of a share of successes in n trials; good near 0 and 1, too."""
    z = 1.96
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    return center - margin, center + margin


def evaluate_gsm8k(model, tokenizer, args, log, step, phase):
    """Print and log the mean scores of one greedy completion per prompt in TEST, and print the last."""
    scores = []
    for start in range(0, len(TEST), 64):
        prompts, answers = zip(*TEST[start : start + 64])
        texts, *_ = sample(model, tokenizer, prompts, args.max_new_tokens, greedy=True)
        scores += [score(text, answer) for text, answer in zip(texts, answers)]
        print(f"\r{phase} model: {len(scores)} of {len(TEST)} problems", end="", flush=True)
    means = mean_scores(scores)
    print(f", greedy: {format_numbers(means)}")
    if all(s["reward"] in (0, 1) for s in scores):
        low, high = wilson_interval(means["reward"], len(scores))
        print(f"    95% interval of the reward: {low:.3f} to {high:.3f}")
    print(f"    {prompts[-1]!r} -> {texts[-1]!r}", flush=True)
    print(json.dumps({"step": step, "phase": phase, "eval": {"n": len(scores)} | means}), file=log)


def group_advantages(rewards, group_size):
    """(N,) to (N, 1), a group's rows together. Rewards 0, 1, 0, 0 become -0.5, 1.5, -0.5, -0.5."""
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]  # so that equal rewards give exactly 0, without rounding noise
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.view(-1, 1)


def grpo_loss(logp, old_logp, ref_logp, advantages, epsilon, beta):
    """Loss of each token, and metrics: all (N, C). advantages: (N, 1). ref_logp: None if beta is 0."""
    ratio = torch.exp(logp - old_logp)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    token_loss = -surrogate
    metrics = {"clip_frac": surrogate < ratio * advantages}  # tokens that the clip holds back
    if beta:  # k3 of joschu.net/blog/kl-approx.html: never negative, its mean is the KL divergence
        kl = torch.expm1(ref_logp - logp) - (ref_logp - logp)  # expm1(x) = exp(x) - 1
        token_loss = token_loss + beta * kl
        metrics["kl"] = kl.detach()
    return token_loss, metrics


stopping = threading.Event()


def stop_after_step(signum, frame):
    """Handle Ctrl-C: finish the running step, save and evaluate. A second Ctrl-C quits at once."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stopping.set()
    print("Stopping after this step. Press Ctrl-C again to quit without saving.", file=sys.stderr)


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
        TRAIN = load_gsm8k(args.dataset, "train")
        TEST = load_gsm8k(args.dataset, "test")[: args.eval_size]
        log = open(args.log, "w", buffering=1)
        if args.save:
            os.makedirs(args.save, exist_ok=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        sys.exit(f"--model {args.model}, --dataset {args.dataset}, --log or --save: {error}")
    if DEVICE == "mps":
        model.set_attn_implementation("eager")  # sdpa can return nan for left-padded rows there
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # no mask is made from ids
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    print(f"model {args.model}: {model.num_parameters():,} parameters on {DEVICE}, seed {args.seed}")
    print(f"dataset {args.dataset}: {len(TRAIN):,} training problems, {len(TEST):,} test problems")
    evaluate_gsm8k(model, tokenizer, args, log, 0, "base")

    signal.signal(signal.SIGINT, stop_after_step)
    for step in range(args.sft_steps):
        if stopping.is_set():
            break
        prompts, answers = zip(*random.choices(TRAIN, k=args.batch_size))
        ids, attn, mask = encode_completions(tokenizer, prompts, answers)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.sft_steps)
        optimizer.zero_grad()
        batch_loss = 0.0
        for start in range(0, len(ids), args.micro_batch_size):
            rows = slice(start, start + args.micro_batch_size)
            logp = completion_logp(model, ids[rows], attn[rows], mask[rows])
            loss = -logp.sum() / mask.sum()  # of the whole batch, so that the parts add up
            loss.backward()
            batch_loss += loss.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        record = {"step": step, "loss": batch_loss, "grad_norm": grad_norm.item()}
        print(f"{format_numbers(record)}  {answers[0][-40:]!r}", flush=True)
        print(json.dumps({"phase": "sft"} | record), file=log)
    if not stopping.is_set():
        evaluate_gsm8k(model, tokenizer, args, log, 0, "sft")

    reference = copy.deepcopy(model).requires_grad_(False) if args.beta else None
    optimizer = torch.optim.Adam(model.parameters(), args.lr)  # without the moments of SFT
    history = []
    for step in range(args.steps):
        if stopping.is_set():
            break

        # 1. sample
        examples = random.choices(TRAIN, k=args.batch_size)
        examples = [example for example in examples for _ in range(args.group_size)]
        prompts, answers = zip(*examples)
        texts, ids, attn, mask, finished = sample(model, tokenizer, prompts, args.max_new_tokens)

        # 2. reward
        scores = [score(text, answer) for text, answer in zip(texts, answers)]
        rewards = torch.tensor([s["reward"] for s in scores], dtype=torch.float32, device=DEVICE)

        # 3. advantage
        advantages = group_advantages(rewards, args.group_size)

        # 4. update
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        old_logp = torch.zeros_like(mask)
        ref_logp = torch.zeros_like(mask)
        for epoch in range(args.update_epochs):
            optimizer.zero_grad()
            parts = []
            for start in range(0, len(ids), args.micro_batch_size):
                rows = slice(start, start + args.micro_batch_size)
                logp = completion_logp(model, ids[rows], attn[rows], mask[rows])
                if epoch == 0:
                    old_logp[rows] = logp.detach()  # the policy that sampled, not updated since
                if epoch == 0 and args.beta:
                    ref_logp[rows] = completion_logp(reference, ids[rows], attn[rows], mask[rows])
                token_loss, part = grpo_loss(
                    logp, old_logp[rows], ref_logp[rows], advantages[rows], args.epsilon, args.beta
                )
                loss = (token_loss * mask[rows]).sum() / mask.sum()  # of the whole batch
                loss.backward()
                parts.append(part)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
        metrics = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        # 5. report: metrics are those of the last update, grad_norm is before clipping
        metrics = {name: ((value * mask).sum() / mask.sum()).item() for name, value in metrics.items()}
        metrics["grad_norm"] = grad_norm.item()
        metrics["tokens"] = mask.sum(1).mean().item()
        metrics["finished"] = finished.float().mean().item()
        groups = rewards.view(-1, args.group_size)
        metrics["zero_std"] = (groups.amax(1) == groups.amin(1)).float().mean().item()  # no reward signal
        record = dict(step=step, **mean_scores(scores), **metrics)  # names must differ
        history.append(record)
        print(f"{format_numbers(record)}  {texts[0][-40:]!r}", flush=True)
        samples = [dict(prompt=p, text=t, **s) for p, t, s in zip(prompts, texts, scores)]
        print(json.dumps({"phase": "grpo"} | record | {"samples": samples}), file=log)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
    evaluate_gsm8k(model, tokenizer, args, log, len(history), "grpo" if history else "sft")
    if DEVICE == "cuda":
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")

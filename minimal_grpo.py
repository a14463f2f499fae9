# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "transformers>=4.56.2", "python-dotenv>=1.0"]
# ///
"""GRPO: reinforce completions that score above the average of their group.

    advantage = (reward - group mean) / (group std + 1e-4)
    ratio = exp(logp - old_logp)
    surrogate = min(ratio * advantage, clip(ratio, 1 - epsilon, 1 + epsilon) * advantage)
    kl = exp(ref_logp - logp) - (ref_logp - logp) - 1
    loss = mean over all completion tokens of (-surrogate + beta * kl)

DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), eq. 3 and 4, but with two updates per batch and one
mean over all tokens: a token weighs the same in a long answer and in a short one (cf. DAPO, 2503.14476).
"""

import collections, copy, json, os, random, time
from dataclasses import dataclass

import dotenv, torch

dotenv.load_dotenv()  # .env, here or in a folder above, may set HF_TOKEN and HF_HOME for the imports below
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
if DEVICE == "cpu" and os.path.isdir("tests/tiny-qwen"):
    MODEL = "tests/tiny-qwen"  # bundled: 0.9M parameters, no use for any other task


@dataclass
class Args:
    model: str = HfArg(default=MODEL, help="Hub id or folder of an instruct model")
    steps: int = HfArg(default=30, help="training steps, one batch each")
    batch_size: int = HfArg(default=8, help="prompts per step")
    group_size: int = HfArg(default=8, help="completions per prompt")
    micro_batch_size: int = HfArg(default=8, help="rows per backward pass; changes memory and speed only")
    max_new_tokens: int = HfArg(default=48, help="longer completions are cut off")
    lr: float = HfArg(default=1e-6, help="learning rate: the lower of warm-up (five steps) and linear decay")
    update_epochs: int = HfArg(default=2, help="optimizer updates per batch")
    epsilon: float = HfArg(default=0.2, help="clip range of the ratio")
    beta: float = HfArg(default=0.04, help="weight of the KL penalty; 0 drops the reference model")
    seed: int = HfArg(default=0, help="on the same CPU, the same seed gives the same numbers")
    log: str = HfArg(default=os.devnull, help="file for JSON lines per step and evaluation; overwritten")
    save: str = HfArg(default="", help="folder for the trained model and its tokenizer")


# The task. For another one, change this block, and --max-new-tokens if its answers are longer.
# score returns "reward" and may add numbers to report; names in the log (n, step, tokens, ...) are taken.
SYSTEM = "Work out the sum. Give the result in XML tags."  # names no tag; the model learns <answer>
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


def end_of_turn(tokenizer):
    """The special token that the chat template writes after an answer, such as <|im_end|>."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ANSWER"}]
    after = tokenizer.apply_chat_template(chat, tokenize=False).split("ANSWER")[-1]
    special = [token for token in tokenizer.tokenize(after) if token in tokenizer.get_added_vocab()]
    return special[0] if special else tokenizer.eos_token


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new_tokens, greedy=False):
    """One completion per prompt, at temperature 1 or greedy: texts, ids, attn, mask, finished.

    ids and attn (N, P+C): prompts padded on the left, completions on the right. mask (N, C): 1 on
    each completion token, the end of turn included. finished (N,): False if the completion was cut
    off at max_new_tokens; it is used like any other.
    """
    ids, attn = encode_prompts(tokenizer, prompts)
    P = ids.shape[1]
    end = tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))
    eos = model.generation_config.eos_token_id  # more tokens to stop at: one id, several or None
    eos = torch.tensor(end if eos is None else eos).to(DEVICE)
    running = torch.ones_like(ids[:, :1], dtype=torch.bool)
    cache = DynamicCache(config=model.config)  # the model adds to it
    tokens = ids  # the first pass reads the prompts, each later one only the newest tokens
    while running.any() and ids.shape[1] < P + max_new_tokens:
        # Positional arguments, as newer versions call the cache by another name. No position ids
        # (None): rotary attention reads only distances, which left padding keeps.
        out = model(tokens, attn, None, cache, use_cache=True, logits_to_keep=1)
        probs = out.logits[:, -1].float().softmax(-1)  # temperature 1, as in completion_logp
        if DEVICE == "mps":
            probs = probs.cpu()  # there, multinomial can draw impossible tokens
        tokens = probs.argmax(-1, keepdim=True) if greedy else torch.multinomial(probs, 1)
        tokens = tokens.to(DEVICE).where(running, tokenizer.pad_token_id)
        ids = torch.cat([ids, tokens], 1)
        attn = torch.cat([attn, running], 1)  # running is still True at an end-of-turn token
        running = running & (tokens != end) & ~torch.isin(tokens, eos)
    finished = ~running.squeeze(1)
    lengths = attn[:, P:].sum(1) - finished.long()  # without the end of turn
    texts = [tokenizer.decode(row[:length]) for row, length in zip(ids[:, P:], lengths)]
    return texts, ids, attn, attn[:, P:].float(), finished


def completion_logp(model, ids, attn, mask):
    """Log-prob of each completion token given all tokens before it, 0 after the end: (N, C)."""
    C = mask.shape[1]
    # The output at each position predicts the next token, so the last token need not go in.
    out = model(ids[:, :-1], attention_mask=attn[:, :-1], use_cache=False, logits_to_keep=C)
    logp = out.logits.float().log_softmax(-1)  # temperature 1, as in sample
    return logp.gather(-1, ids[:, -C:].unsqueeze(-1)).squeeze(-1) * mask


def mean_scores(scores):
    """The mean of each number that score returns."""
    return {name: float(sum(s[name] for s in scores)) / len(scores) for name in scores[0]}


def format_numbers(record):
    """{"step": 3, "reward": 0.25} becomes "step 3  reward 0.25"."""
    return "  ".join(f"{name} {value:.4g}" for name, value in record.items())


def evaluate(model, tokenizer, args, log, step, greedy=False, **labels):
    """Complete each prompt in TEST; print and log the mean scores (with labels), print the last text."""
    scores = []
    for start in range(0, len(TEST), 128):
        prompts, answers = zip(*TEST[start : start + 128])
        texts, *_ = sample(model, tokenizer, prompts, args.max_new_tokens, greedy)
        scores += [score(text, answer) for text, answer in zip(texts, answers)]
        if len(TEST) > 128:
            print(f"{len(scores)} of {len(TEST)} prompts", end="\r", flush=True)
    if scores:  # none if TEST is empty
        means = mean_scores(scores)
        how = "greedy" if greedy else "sampled"
        print(f"after {step} steps, {how}, {len(scores)} prompts: {format_numbers(means)}")
        print(f"    {prompts[-1]!a} -> {texts[-1]!a}", flush=True)
        print(json.dumps({"step": step, **labels, "eval": dict(n=len(scores), **means)}), file=log)


def group_advantages(rewards, group_size):
    """(N,) to (N, 1), a group's rows together. Rewards 0, 1, 0, 0 (std 0.5) become -0.5, 1.5, -0.5, -0.5."""
    groups = rewards.view(-1, group_size)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.view(-1, 1)


def grpo_loss(logp, old_logp, ref_logp, advantages, epsilon, beta):
    """Loss of each token, and metrics: all (N, C). advantages: (N, 1). ref_logp is unused if beta is 0."""
    ratio = torch.exp(logp - old_logp)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    token_loss = -surrogate
    metrics = {"clip_frac": surrogate < ratio * advantages}  # tokens held back by the clip
    if beta:
        # k3 of joschu.net/blog/kl-approx.html: on the policy's own samples its mean is
        # KL(policy || reference), though its gradient is that of KL(reference || policy).
        kl = torch.expm1(ref_logp - logp) - (ref_logp - logp)  # expm1(x) = exp(x) - 1
        token_loss = token_loss + beta * kl
        metrics["kl"] = kl.detach()
    return token_loss, metrics


if __name__ == "__main__":
    parser = HfArgumentParser(Args, allow_abbrev=False)
    args = parser.parse_args(None if "__file__" in globals() else [])  # [] in a notebook
    assert args.group_size > 1, "--group-size must be 2 or more: a group's completions are compared"
    print(f"--model {args.model} on {DEVICE}, seed {args.seed}", flush=True)
    set_seed(args.seed)
    # float32: bf16 weights would round such small updates away. from_pretrained turns dropout off.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE)
    if DEVICE == "mps":
        model.set_attn_implementation("eager")  # sdpa can return nan for left-padded rows there
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or end_of_turn(tokenizer)  # any will do: the masks hide it
    if args.save:  # now, so that a bad path fails before training
        os.makedirs(args.save, exist_ok=True)
        tokenizer.save_pretrained(args.save)
    log = open(args.log, "w", buffering=1)
    print(f"{model.num_parameters():,} parameters, {len(TRAIN):,} training prompts", flush=True)
    evaluate(model, tokenizer, args, log, 0)

    reference = copy.deepcopy(model).requires_grad_(False) if args.beta else None
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    history = []
    try:
        for step in range(args.steps):
            start = time.time()
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
            optimizer.param_groups[0]["lr"] = args.lr * min((step + 1) / 5, 1 - step / args.steps)
            old_logp = torch.zeros_like(mask)  # filled below: log-probs during sampling differ by rounding
            ref_logp = torch.zeros_like(mask)
            for epoch in range(args.update_epochs):
                metrics = collections.defaultdict(float)  # those of the last update are reported
                for rows in torch.arange(len(ids)).split(args.micro_batch_size):
                    if epoch == 0 and args.beta:
                        ref_logp[rows] = completion_logp(reference, ids[rows], attn[rows], mask[rows])
                    logp = completion_logp(model, ids[rows], attn[rows], mask[rows])
                    if epoch == 0:  # before the first update
                        old_logp[rows] = logp.detach()
                    inputs = (logp, old_logp[rows], ref_logp[rows], advantages[rows])
                    token_loss, token_metrics = grpo_loss(*inputs, args.epsilon, args.beta)
                    weight = mask[rows] / mask.sum()  # of each token in means over the whole batch
                    loss = (token_loss * weight).sum()
                    loss.backward()  # adds to the gradients of the other micro-batches
                    for name, value in token_metrics.items():
                        metrics[name] += (value * weight).sum().item()
                grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
                optimizer.step()
                optimizer.zero_grad()

            # 5. report
            metrics["grad_norm"] = grad_norm.item()  # before clipping
            metrics["entropy"] = -(old_logp.sum() / mask.sum()).item()  # per token, an estimate
            groups = rewards.view(-1, args.group_size)
            metrics["zero_std"] = (groups.amax(1) == groups.amin(1)).float().mean().item()  # equal rewards
            metrics["tokens"] = mask.sum(1).mean().item()
            metrics["finished"] = finished.float().mean().item()
            metrics["seconds"] = time.time() - start
            record = dict(step=step, **mean_scores(scores), **metrics)
            history.append(record)
            print(f"{format_numbers(record)}  {texts[0][-40:]!a}", flush=True)
            samples = [dict(prompt=p, text=t, **s) for p, t, s in zip(prompts, texts, scores)]
            print(json.dumps(record | {"samples": samples}, default=float), file=log)
    finally:  # after Ctrl-C or an error, too
        if args.save and history:
            model.save_pretrained(args.save)
    evaluate(model, tokenizer, args, log, len(history))

"""gsm8k_sft_grpo.py with less work for a CPU. It made the logs whose names have 16x8, those of seed 0 in earlier versions.

    uv run tests/real/gsm8k_fast.py MODEL DATASET --log LOG.jsonl

Data, prompts, score, advantages and loss are the script's own functions; with --sft-steps 0 the method is gsm8k_grpo.py's. What
differs saves work and is the same mathematics, though a seed draws other completions. --dtype bfloat16 is for CPUs whose `lscpu`
shows avx512_bf16 or amx_bf16: products and logits are then in bfloat16, and so are the gradients of about 2,500 tokens at a time;
their sum, weights and moments are in float32.

- Qwen2's forward pass is written out: no padding, and a prompt is read once for all completions of its group.
- Finished completions leave the batch while the others are sampled.
- Without a KL penalty, completions with advantage 0 have no gradient and are left out of the update.
- The gradient of the log-probs is computed with them, so that no (tokens, vocabulary) array outlives its piece.

entropy is over the whole batch, kl over --kl-rows of its completions, before its last update.
tests/test_gsm8k_fast.py compares all of it with the script.
"""

import argparse
import importlib.util
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("gsm8k_sft_grpo", ROOT / "gsm8k_sft_grpo.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def parse(arguments=None):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--log", default="/dev/null")
    parser.add_argument("--save", default="", help="folder for the trained model; FOLDER-sft: after SFT")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--sft-steps", type=int, default=0)
    parser.add_argument("--sft-lr", type=float, default=3e-6)
    parser.add_argument("--sft-batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=3e-6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--update-epochs", type=int, default=1)
    parser.add_argument("--epsilon", type=float, default=0.2)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--eval-size", type=int, default=256, help="test problems, greedy")
    parser.add_argument("--eval-sampled", type=int, default=0, help="test problems, sampled once each")
    parser.add_argument("--eval-every", type=int, default=0)
    parser.add_argument("--no-before", action="store_true", help="skip the evaluation of the untrained model")
    parser.add_argument("--kl-rows", type=int, default=4)
    parser.add_argument("--stop-at", type=float, default=math.inf, help="seconds after which no step begins")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


class Qwen2:
    """The weights, fused into few matrices: master in float32 with gradients, work in the dtype of the products."""

    def __init__(self, folder, dtype):
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = hf.config
        assert config.model_type == "qwen2" and config.tie_word_embeddings, (
            "written for small Qwen2 models only"
        )
        self.folder = folder
        eos = hf.generation_config.eos_token_id
        self.eos = eos if isinstance(eos, list) else [eos]
        self.layers, self.heads, self.kv = (
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.size = config.hidden_size // self.heads  # of a head
        self.eps, self.dtype = config.rms_norm_eps, dtype
        self.master = fuse(hf.state_dict(), self.layers)
        for weight in self.master.values():
            weight.grad = torch.zeros_like(weight)
        self.work = {name: w.to(dtype).clone().requires_grad_(True) for name, w in self.master.items()}
        theta = config.rope_parameters["rope_theta"]
        angles = torch.arange(4096)[:, None] / theta ** (torch.arange(0, self.size, 2) / self.size)
        self.cos, self.sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()
        # The layout of the CPU's bfloat16 kernels saves them rearranging a matrix for each product.
        self.pack = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.packed = {}
        self.renew()

    @torch.no_grad()
    def renew(self):
        """After an update: the working copy follows the weights."""
        for name, weight in self.master.items():
            self.work[name].copy_(weight)
            if self.pack and weight.dim() == 2:
                self.packed[name] = torch.ops.mkldnn._reorder_linear_weight(self.work[name].detach(), 64)

    def linear(self, x, name, bias=None):
        """For sampling, without gradients."""
        if self.pack:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed[name], bias, "none", [], "")
        return F.linear(x, self.work[name], bias)

    def norm(self, x, weight):
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight).to(self.dtype)

    def rotate(self, x, positions):
        """Rotary positions: x (..., tokens, size)."""
        first, second = x.float().chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return (x * self.cos[positions] + turned * self.sin[positions]).to(self.dtype)

    def hidden(self, weights, groups):
        """groups: [(prompt ids, [completion ids, ...]), ...]. Of one packed row, each prompt followed by its completions, each without
        its last token: the final hidden states (tokens, hidden), those that predict each completion, keys and values, the embeddings.
        """
        tokens, positions, layout, predict = [], [], [], []
        end = 0
        for prompt, completions in groups:
            own = slice(end, end + len(prompt))
            tokens.append(prompt)
            positions.append(torch.arange(len(prompt)))
            end = own.stop
            starts, lengths = [], []
            for completion in completions:
                length = len(completion) - 1
                tokens.append(completion[:-1])
                positions.append(len(prompt) + torch.arange(length))
                predict.append(torch.cat([torch.tensor([own.stop - 1]), torch.arange(end, end + length)]))
                starts.append(end)
                lengths.append(length)
                end += length
            width = max(lengths, default=0)
            place = torch.arange(width)
            # (completions, width): what is past a completion's end belongs to another one, and is not `real`
            take = (torch.tensor(starts, dtype=torch.long)[:, None] + place).clamp(max=end - 1)
            real = place < torch.tensor(lengths)[:, None] if width else None
            sees = torch.ones(width, len(prompt) + width, dtype=torch.bool).tril(len(prompt))
            layout.append((own, take, real, sees))
        tokens, positions = torch.cat(tokens), torch.cat(positions)
        embedded = weights["emb"].detach()[tokens].float()  # the sum of all layers stays in float32
        x = embedded.requires_grad_(torch.is_grad_enabled())
        cache = []
        for i in range(self.layers):
            h = self.norm(x, weights[f"{i}.norm1"])
            qkv = F.linear(h, weights[f"{i}.qkv"], weights[f"{i}.qkv_bias"])
            q, k, v = (
                qkv.view(-1, self.heads + 2 * self.kv, self.size)
                .transpose(0, 1)
                .split([self.heads, self.kv, self.kv])
            )
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            cache.append((k, v))
            k, v = (t.repeat_interleave(self.heads // self.kv, 0) for t in (k, v))
            mixed = []
            for own, take, real, sees in layout:
                out = F.scaled_dot_product_attention(
                    q[None, :, own], k[None, :, own], v[None, :, own], is_causal=True
                )
                mixed.append(out[0].transpose(0, 1).flatten(1))
                if real is not None:  # completions side by side, each behind the prompt
                    qs, ks, vs = (t[:, take].transpose(0, 1) for t in (q, k, v))
                    before = (t[None, :, own].expand(len(take), -1, -1, -1) for t in (k, v))
                    ks, vs = (torch.cat(pair, 2) for pair in zip(before, (ks, vs)))
                    out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=sees)
                    mixed.append(out.transpose(1, 2).flatten(2)[real])
            x = x + F.linear(torch.cat(mixed), weights[f"{i}.o"])
            gate, up = F.linear(self.norm(x, weights[f"{i}.norm2"]), weights[f"{i}.gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, weights[f"{i}.down"])
        return self.norm(x, weights["norm"]), predict, cache, (tokens, embedded)

    @torch.no_grad()
    def sample(self, prompts, copies, limit, stops, greedy=False):
        """prompts: lists of ids. For each copy of each: ids with the end of turn, finished, the log-prob of the whole."""
        width = max(len(p) for p in prompts)
        total = len(prompts) * copies
        shape = (total, self.kv, width + limit, self.size)
        keys = [torch.zeros(shape, dtype=self.dtype) for _ in range(self.layers)]
        values = [torch.zeros(shape, dtype=self.dtype) for _ in range(self.layers)]
        bias = torch.zeros(total, width + limit, dtype=self.dtype)
        last = []
        for j, prompt in enumerate(prompts):
            h, _, cache, _ = self.hidden(self.work, [(prompt, [])])
            rows, slots = slice(j * copies, (j + 1) * copies), slice(width - len(prompt), width)
            for i, (k, v) in enumerate(cache):
                keys[i][rows, :, slots] = k
                values[i][rows, :, slots] = v
            bias[rows, : slots.start] = -math.inf
            last.append(h[-1].expand(copies, -1))
        h = torch.cat(last)
        padding = torch.tensor([width - len(p) for p in prompts]).repeat_interleave(copies)
        row_of = torch.arange(total)  # the completion that each row of the cache writes
        done = torch.zeros(total, dtype=torch.bool)
        ids = [[] for _ in range(total)]
        logps, finished = torch.zeros(total), torch.zeros(total, dtype=torch.bool)
        for step in range(limit):
            logits = self.linear(h, "emb")
            if greedy:
                tokens, logp = logits.argmax(1), torch.zeros(len(logits))
            else:
                tokens, logp = draw(logits)
            logps[row_of[~done]] += logp[~done]
            for row, token, over in zip(row_of.tolist(), tokens.tolist(), done.tolist()):
                if not over:
                    ids[row].append(token)
            done = done | torch.isin(tokens, stops)
            finished[row_of[done]] = True
            if done.all() or step == limit - 1:
                break
            slot = width + step
            if (~done).sum() < 0.85 * len(done):
                keep = (~done).nonzero()[:, 0]
                for cache in (keys, values):
                    for i in range(self.layers):
                        smaller = cache[i].new_empty(len(keep), *shape[1:])
                        smaller[:, :, :slot] = cache[i][keep, :, :slot]
                        cache[i] = smaller
                row_of, bias, padding, tokens, done = (t[keep] for t in (row_of, bias, padding, tokens, done))
            positions = (slot - padding)[:, None]
            x = self.work["emb"][tokens].float()
            for i in range(self.layers):
                h = self.norm(x, self.work[f"{i}.norm1"])
                qkv = self.linear(h, f"{i}.qkv", self.work[f"{i}.qkv_bias"]).view(len(x), -1, self.size)
                qk, v = qkv.split([self.heads + self.kv, self.kv], 1)
                q, k = self.rotate(qk, positions).split([self.heads, self.kv], 1)
                keys[i][:, :, slot], values[i][:, :, slot] = k, v
                # the query heads that share a key head, as if they were positions
                mixed = F.scaled_dot_product_attention(
                    q.reshape(len(x), self.kv, -1, self.size),
                    keys[i][:, :, : slot + 1],
                    values[i][:, :, : slot + 1],
                    attn_mask=bias[:, None, None, : slot + 1],
                )
                x = x + self.linear(mixed.reshape(len(x), -1), f"{i}.o")
                gate, up = self.linear(self.norm(x, self.work[f"{i}.norm2"]), f"{i}.gate_up").chunk(2, -1)
                x = x + self.linear(F.silu(gate) * up, f"{i}.down")
            h = self.norm(x, self.work["norm"])
        return [torch.tensor(row) for row in ids], finished, logps

    def logp(self, weights, h, targets, derivative=None):
        """Log-probs (tokens,) of targets after hidden states h; with derivative(logp, start) = d loss / d logp, the gradient for h
        as well, and that of the embedding, which is the output matrix too, added to master's.
        """
        emb = weights["emb"].detach()
        logps, gradients = [], []
        for start in range(0, len(h), PIECE):
            part, target = h[start : start + PIECE].detach(), targets[start : start + PIECE, None]
            logits = F.linear(part, emb).float()
            normalizer = logits.logsumexp(1, keepdim=True)
            logps.append((logits.gather(1, target) - normalizer)[:, 0])
            if derivative:
                slope = derivative(logps[-1], start)[:, None]
                softmax = logits.sub_(normalizer).exp_()
                # d loss / d logits = slope * (1 at the target, else 0, - softmax)
                gradient = softmax.mul_(-slope).scatter_add_(1, target, slope).to(self.dtype)
                gradients.append(gradient @ emb)
                self.master["emb"].grad += gradient.T @ part
        return torch.cat(logps), torch.cat(gradients) if derivative else None

    def backward(self, groups, derivative, room=2500):
        """Adds the gradient to master's, about room tokens at a time, and returns the log-probs of all completion tokens.

        derivative(logp, start): d loss / d logp of the completion tokens from start on, counted over all groups.
        """
        batches, used = [[]], 0
        for group in groups:
            size = len(group[0]) + sum(len(c) for c in group[1])
            if batches[-1] and used + size > room:
                batches.append([])
                used = 0
            batches[-1].append(group)
            used += size
        logps, before = [], 0
        for batch in batches:
            h, predict, _, (tokens, embedded) = self.hidden(self.work, batch)
            h = h[torch.cat(predict)]
            targets = torch.cat([c for _, completions in batch for c in completions])
            logp, gradient = self.logp(
                self.work, h, targets, lambda logp, start: derivative(logp, before + start)
            )
            h.backward(gradient)
            self.master["emb"].grad.index_add_(0, tokens, embedded.grad)
            for name, weight in self.work.items():
                if weight.grad is not None:
                    self.master[name].grad += weight.grad
                    weight.grad = None
            logps.append(logp)
            before += len(targets)
        return torch.cat(logps)

    @torch.no_grad()
    def score_tokens(self, weights, groups):
        """Log-probs of all completion tokens of groups."""
        logps = []
        for prompt, completions in groups:
            h, predict, *_ = self.hidden(weights, [(prompt, completions)])
            logps.append(self.logp(weights, h[torch.cat(predict)], torch.cat(completions))[0])
        return torch.cat(logps)

    def save(self, folder):
        hf = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        hf.load_state_dict(split(self.master, self.layers, self.heads, self.kv, self.size))
        hf.save_pretrained(folder)


PIECE = 1024  # tokens whose logits are in memory at once
MATRICES = {"o": "self_attn.o_proj", "down": "mlp.down_proj"}
NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}


def fuse(state, layers):
    """Weights by short names; q, k and v in one matrix, gate and up in another."""
    fused = {"emb": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    for i in range(layers):
        of = f"model.layers.{i}."
        fused[f"{i}.qkv"] = torch.cat([state[f"{of}self_attn.{n}_proj.weight"] for n in "qkv"])
        fused[f"{i}.qkv_bias"] = torch.cat([state[f"{of}self_attn.{n}_proj.bias"] for n in "qkv"])
        fused[f"{i}.gate_up"] = torch.cat([state[f"{of}mlp.{n}_proj.weight"] for n in ("gate", "up")])
        for short, name in (MATRICES | NORMS).items():
            fused[f"{i}.{short}"] = state[f"{of}{name}.weight"]
    return {name: weight.detach().clone() for name, weight in fused.items()}


def split(fused, layers, heads, kv, size):
    """The other way round."""
    state = {"model.embed_tokens.weight": fused["emb"], "lm_head.weight": fused["emb"]}
    state["model.norm.weight"] = fused["norm"]
    for i in range(layers):
        of = f"model.layers.{i}."
        for part, name in (("weight", "qkv"), ("bias", "qkv_bias")):
            for n, weight in zip("qkv", fused[f"{i}.{name}"].split([heads * size, kv * size, kv * size])):
                state[f"{of}self_attn.{n}_proj.{part}"] = weight
        for n, weight in zip(("gate", "up"), fused[f"{i}.gate_up"].chunk(2)):
            state[f"{of}mlp.{n}_proj.weight"] = weight
        for short, name in (MATRICES | NORMS).items():
            state[f"{of}{name}.weight"] = fused[f"{i}.{short}"]
    return state


def draw(logits):
    """A token of each row's softmax in two stages, a block of 128 tokens, then one of them, and its log-prob. torch.multinomial
    draws a random number for each entry, which takes longer than a pass of the model.
    """
    tokens, logps = [], []
    for part in logits.split(8):  # few rows at once fit the cache
        part = part.float()
        probs = (part - part.amax(1, keepdim=True)).exp_()
        probs = F.pad(probs, (0, -probs.shape[1] % 128))
        probs = probs.view(len(part), -1, 128)
        blocks = probs.sum(2)
        block = torch.multinomial(blocks, 1)
        inside = probs.gather(1, block[:, :, None].expand(-1, 1, 128)).squeeze(1)
        place = torch.multinomial(inside, 1)
        tokens.append((block * 128 + place).squeeze(1))
        logps.append((inside.gather(1, place).squeeze(1) / blocks.sum(1)).log())
    return torch.cat(tokens), torch.cat(logps)


def grpo_derivative(advantages, old_logp, ref_logp, epsilon, beta, count):
    """d loss / d logp of each token, by differentiating the script's loss. All (tokens,); count: the batch's completion tokens."""

    def derivative(logp, start):
        own = slice(start, start + len(logp))
        leaf = logp.detach()[:, None].requires_grad_(True)
        old = leaf.detach() if old_logp is None else old_logp[own, None]
        ref = None if ref_logp is None else ref_logp[own, None]
        loss, _ = script.grpo_loss(leaf, old, ref, advantages[own, None], epsilon, beta)
        return torch.autograd.grad(loss.sum() / count, leaf)[0][:, 0]

    return derivative


def main(args):
    begin = time.time()
    set_seed(args.seed)
    model = Qwen2(args.model, getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    train, test = (script.load_gsm8k(args.dataset, part) for part in ("train", "test"))
    end = script.end_of_turn(tokenizer)
    stops = torch.tensor([tokenizer.convert_tokens_to_ids(end), *(e for e in model.eos if e is not None)])
    log = open(args.log, "w", buffering=1)
    if args.save:
        tokenizer.save_pretrained(args.save)
    kl_random = random.Random(args.seed)  # the problems drawn do not depend on --kl-rows

    def encode(prompt):
        return script.encode_prompts(tokenizer, [prompt])[0][0].cpu()

    def write(record):
        shown = {k: v for k, v in (record | record.get("eval", {})).items() if isinstance(v, int | float)}
        print(record["phase"], record.get("how", ""), script.format_numbers(shown), flush=True)
        print(json.dumps(record, default=float), file=log)

    def sample(prompts, copies, greedy=False):
        out = model.sample([encode(p) for p in prompts], copies, args.max_new_tokens, stops, greedy)
        return *out, [tokenizer.decode(ids[:-1] if done else ids) for ids, done in zip(out[0], out[1])]

    def evaluate(step, phase, greedy, size):
        start = time.time()
        scores, ids, finished, logps = [], [], [], []
        for at in range(0, min(size, len(test)), 256):
            prompts, answers = zip(*test[:size][at : at + 256])
            part = sample(prompts, 1, greedy)
            ids, finished, logps = ids + part[0], finished + part[1].tolist(), logps + part[2].tolist()
            scores += [script.score(text, answer) for text, answer in zip(part[3], answers)]
        tokens = sum(len(row) for row in ids)
        record = {"step": step, "eval": {"n": len(scores), **script.mean_scores(scores)}}
        record |= {"finished": sum(finished) / len(scores), "tokens": tokens / len(scores)}
        record |= {} if greedy else {"entropy": -sum(logps) / tokens}
        record |= {"seconds": time.time() - start, "phase": phase, "how": "greedy" if greedy else "sampled"}
        record["right"] = [int(s["reward"]) for s in scores]  # of each problem, to compare two models
        write(record | {"example": {"prompt": prompts[-1], "text": part[3][-1]}})

    def evaluations(step, phase):
        if args.eval_size:
            evaluate(step, phase, True, args.eval_size)
        if args.eval_sampled:
            evaluate(step, phase, False, args.eval_sampled)

    def update(optimizer, lr):
        optimizer.param_groups[0]["lr"] = lr
        weights = list(model.master.values())
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0, error_if_nonfinite=True)
        optimizer.step()
        for weight in weights:
            weight.grad.zero_()
        model.renew()
        return norm.item()

    if not args.no_before:
        evaluations(0, "base")

    optimizer = torch.optim.Adam(list(model.master.values()), args.sft_lr, fused=True)
    for step in range(args.sft_steps):
        start = time.time()
        groups = []
        for prompt, solution in random.choices(train, k=args.sft_batch_size):
            groups.append((encode(prompt), [tokenizer(solution + end, return_tensors="pt")["input_ids"][0]]))
        count = sum(len(completions[0]) for _, completions in groups)
        logp = model.backward(groups, lambda logp, _: torch.full_like(logp, -1 / count))
        lr = args.sft_lr * min((step + 1) / 5, 1 - step / args.sft_steps)
        record = {"step": step, "loss": -logp.mean().item(), "grad_norm": update(optimizer, lr)}
        write(record | {"seconds": time.time() - start, "phase": "sft"})
    if args.sft_steps:
        if args.save:
            model.save(f"{args.save}-sft")
            tokenizer.save_pretrained(f"{args.save}-sft")
        evaluations(args.sft_steps, "sft")

    reference = None
    if args.beta or args.kl_rows:
        reference = {name: weight.detach().clone() for name, weight in model.work.items()}
    optimizer = torch.optim.Adam(list(model.master.values()), args.lr, fused=True)
    done = args.sft_steps
    for step in range(args.steps):
        if time.time() - begin > args.stop_at:
            break
        if args.eval_every and step and step % args.eval_every == 0:
            evaluations(done, "grpo")
            if args.save:
                model.save(args.save)
        start = time.time()
        prompts, answers = zip(*random.choices(train, k=args.batch_size))
        ids, finished, logps, texts = sample(prompts, args.group_size)
        sampled = time.time() - start
        of = [row // args.group_size for row in range(len(ids))]  # each completion's prompt
        scores = [script.score(text, answers[g]) for text, g in zip(texts, of)]
        rewards = torch.tensor([s["reward"] for s in scores])
        advantages = script.group_advantages(rewards, args.group_size)[:, 0]
        lengths = torch.tensor([len(row) for row in ids])
        count = lengths.sum()
        keep = [row for row in range(len(ids)) if args.beta or advantages[row] != 0]
        metrics = {}
        groups = [(encode(prompt), []) for prompt in prompts]
        for row in keep:
            groups[of[row]][1].append(ids[row])
        groups = [group for group in groups if group[1]]  # may be empty, but Adam's moments move the weights
        token_advantages = advantages[keep].repeat_interleave(lengths[keep])
        old_logp = None
        ref_logp = model.score_tokens(reference, groups) if args.beta else None
        for epoch in range(args.update_epochs):
            if args.kl_rows and epoch == args.update_epochs - 1:
                rows = kl_random.sample(range(len(ids)), min(args.kl_rows, len(ids)))
                pairs = [(encode(prompts[of[row]]), [ids[row]]) for row in rows]
                difference = model.score_tokens(reference, pairs) - model.score_tokens(model.work, pairs)
                metrics["kl"] = (torch.expm1(difference) - difference).mean().item()
            if groups:
                terms = (token_advantages, old_logp, ref_logp, args.epsilon, args.beta, count)
                logp = model.backward(groups, grpo_derivative(*terms))
                old_logp = logp if epoch == 0 else old_logp
            lr = args.lr * min((step + 1) / 5, 1 - step / args.steps)
            metrics["grad_norm"] = update(optimizer, lr)
        metrics["entropy"] = (-logps.sum() / count).item()
        groups = rewards.view(-1, args.group_size)
        metrics["zero_std"] = (groups.amax(1) == groups.amin(1)).float().mean().item()
        metrics |= {"tokens": count.item() / len(ids), "finished": finished.float().mean().item()}
        metrics |= {"sample_seconds": sampled, "seconds": time.time() - start, "phase": "grpo"}
        samples = [dict(prompt=prompts[of[row]], text=texts[row], **scores[row]) for row in range(len(ids))]
        record = {"step": done, **script.mean_scores(scores), **metrics}
        write(record | {"samples": samples})
        done += 1
    if args.save:
        model.save(args.save)
    if args.steps:
        evaluations(done, "grpo")


if __name__ == "__main__":
    main(parse())

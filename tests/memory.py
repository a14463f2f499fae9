"""What each script needs on a GPU at its default flags and default model, counted: nothing is computed.

    uv run tests/memory.py

Weights, gradients, Adam's moments, reference and critic, and then whatever else is alive at the worst moment of the forward and backward
pass of one micro-batch, in float32. The tensors are made on PyTorch's "meta" device, which has shapes and no numbers, so this takes
seconds and runs anywhere. Not counted: the CUDA context and what the allocator cannot use.

    uv run tests/memory.py QWEN SMOLLM minimal_sft ...

measures instead, on a CPU, on real models (folders or Hub ids): the scripts named (or all), two steps each, no evaluation where that has
a flag. Printed is the peak of the process above what it takes with the libraries loaded. It includes what the CPU's allocator leaves lying about.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

GIB = 2**30
QWEN = {  # Qwen2.5-(Coder-)0.5B
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SMOLLM = {  # SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
# prompt tokens, completion tokens (at their limit, but for the given completions of SFT and DPO), rows with a graph
ROWS = {
    "minimal_sft": (50, 12, lambda args: args.batch_size),
    "minimal_dpo": (50, 12, lambda args: 2 * args.batch_size),
    "minimal_grpo": (50, 48, lambda args: args.micro_batch_size),
    "minimal_ppo": (50, 48, lambda args: args.micro_batch_size),
    "reinforce": (50, 160, lambda args: args.micro_batch_size),
    "rloo": (50, 160, lambda args: args.micro_batch_size),
    "gsm8k_grpo": (150, 400, lambda args: args.micro_batch_size),
    "gsm8k_sft_grpo": (150, 400, lambda args: args.micro_batch_size),
}


class Attention(torch.autograd.Function):
    """What a fused attention kernel keeps for the backward pass: its inputs and output, and no matrix of tokens by tokens."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class Live(TorchDispatchMode):
    """The bytes of all tensors made under it that are alive at the same time, at most; views of the weights are none of these."""

    def __init__(self, model):
        super().__init__()
        self.weights = {StorageWeakRef(weight.untyped_storage()) for weight in model.parameters()}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (ref := StorageWeakRef(storage)) not in self.weights:
                    self.alive[ref] = storage.nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def activations(model, P, C, N):
    """Bytes alive at the worst moment of a micro-batch's passes. A weight's gradient is left out: its place is counted with the weights."""
    ids = torch.zeros(N, P + C, dtype=torch.long, device="meta")
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    attn = torch.ones(N, 1, P + C - 1, P + C - 1, dtype=torch.bool, device="meta")  # as transformers makes it
    with Live(model) as live:  # completion_logp, and the backward pass
        logits = model(ids[:, :-1], attention_mask=attn, use_cache=False, logits_to_keep=C).logits
        logp = logits.float().log_softmax(-1)
        del logits
        logp = logp.gather(-1, ids[:, -C:].unsqueeze(-1)).squeeze(-1)
        logp.sum().backward()
    return live.peak


def count():
    print("| script | weights, gradients, moments | with reference, critic | micro-batch | together |")
    for script, (P, C, rows) in ROWS.items():
        llama = script in ("reinforce", "rloo")
        with torch.device("meta"):
            model = (
                LlamaForCausalLM(LlamaConfig(**SMOLLM)) if llama else Qwen2ForCausalLM(Qwen2Config(**QWEN))
            ).eval()
        weights = 4 * model.num_parameters() / GIB
        args = importlib.import_module(script).Args()
        reference = getattr(args, "beta", 0) > 0
        states = 4 * weights + reference * weights + (script == "minimal_ppo") * 4 * weights
        N = rows(args)
        peak = activations(model, P, C, N)
        print(
            f"| {script} | {4 * weights:.1f} | {states:.1f} | {peak / GIB:.1f} | {states + peak / GIB:.1f} |"
        )
    model.gradient_checkpointing_enable()
    model.train()
    for rows in (2, 8):
        peak = activations(model, P, C, rows)
        print(f"{script} with gradient checkpointing, micro-batches of {rows}: {peak / GIB:.1f}")


def measure(qwen, smollm, scripts):
    """The peak of each process, and what a process takes that only loads the libraries, in GiB."""
    for script in scripts or ROWS:
        run = "import runpy, sys, transformers, datasets; sys.argv = sys.argv[1:]; "
        run += "status = lambda name: float(open('/proc/self/status').read().split(name + ':')[1].split()[0]) / 2**20; "
        run += "start = status('VmRSS'); runpy.run_path(sys.argv[0], run_name='__main__'); "
        run += "print('PEAK', status('VmHWM') - start)"
        model = smollm if script in ("reinforce", "rloo") else qwen
        flags = ["--steps", "2", "--model", model]
        if script.startswith("gsm8k"):
            flags += ["--eval-size", "0", "--dataset", os.environ.get("GSM8K", "openai/gsm8k")]
        command = [sys.executable, "-c", run, f"{script}.py", *flags, *os.environ.get("FLAGS", "").split()]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(f"{script}: {float(out.split('PEAK')[1]):.1f} GiB\n{out}", flush=True)


if __name__ == "__main__":
    torch.nn.functional.scaled_dot_product_attention = lambda query, key, value, **kwargs: Attention.apply(
        query, key, value
    )
    measure(sys.argv[1], sys.argv[2], sys.argv[3:]) if len(sys.argv) > 2 else count()

"""Our sampler against model.generate, a batch of minimal_grpo.py against TRL's GRPOTrainer, and what micro-batches save.

    uv run tests/benchmark.py

Prints one table, each row ours / theirs / ratio, medians of at least 5 runs taken in turn (memory on a CPU:
of 2); then where the time goes. tests/memory.py counts what the scripts take on a GPU.
On a CPU it times the bundled model; on CUDA also a Qwen2 of Qwen2.5-0.5B's shape with random weights, for
speed and memory depend on the shape alone. TRL's row needs the dev dependencies.
"""

import contextlib
import copy
import io
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import minimal_grpo
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

RUNS = 5
DEVICE = minimal_grpo.DEVICE
HALF_BILLION = {  # Qwen2.5-0.5B
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def row(what, ours, theirs, unit, more_is_better=True):
    """Prints the medians of two lists and how many times better ours is."""
    a, b = statistics.median(ours), statistics.median(theirs)
    ratio = a / b if more_is_better else b / a
    print(f"{what:<52}{a:>11.4g}{b:>11.4g} {unit:<9}{ratio:>6.2f}", flush=True)


def timed(function):
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def sampling(name, model, tokenizer, tokens=64):
    """Tokens a second at 1, 8 and 64 rows, none of which may end early."""
    never = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
    never.pad_token_id = tokenizer.pad_token_id
    for rows in (1, 8, 64):
        prompts = [f"What is {i % 10} + {i // 10}?" for i in range(rows)]
        ids, attn = minimal_grpo.encode_prompts(tokenizer, prompts)
        model.generation_config = GenerationConfig(eos_token_id=[len(tokenizer) + 10**6])
        ours, theirs = [], []
        for run in range(RUNS + 1):  # the first warms up
            seconds = timed(lambda: minimal_grpo.sample(model, tokenizer, prompts, tokens))
            model.generation_config = never
            both = [seconds, timed(lambda: model.generate(ids, attention_mask=attn, generation_config=never))]
            model.generation_config = GenerationConfig(eos_token_id=[len(tokenizer) + 10**6])
            if run:
                ours.append(rows * tokens / both[0])
                theirs.append(rows * tokens / both[1])
        row(f"{name}: sampling {rows} rows, ours / generate", ours, theirs, "tokens/s")


class StepClock(io.StringIO):
    """Takes what a script prints, and the time of each line that starts with "step"."""

    def __init__(self):
        super().__init__()
        self.marks = []

    def write(self, text):
        if text.startswith("step "):
            self.marks.append(time.perf_counter())
        return super().write(text)


def ours_grpo(script, steps, group_size=8):
    """Seconds of each batch of the script; a learning rate of 0 keeps the completions as long as they are at first."""
    sys.argv = f"{script} --steps {steps} --lr 0 --seed {steps} --group-size {group_size}".split()
    sys.argv += ["--micro-batch-size", str(8 * group_size)]  # one pass, as TRL's
    clock = StepClock()
    with contextlib.redirect_stdout(clock), contextlib.redirect_stderr(io.StringIO()):
        runpy.run_path(str(script), run_name="__main__")
    assert len(clock.marks) == steps
    return [b - a for a, b in zip(clock.marks, clock.marks[1:])]


def shared_prompts(folder):
    """minimal_grpo.py with tests/variants/shared_prompts.diff applied."""
    script = Path(folder) / "shared_prompts.py"
    script.write_text(Path("minimal_grpo.py").read_text())
    subprocess.run(["patch", "--silent", script, "tests/variants/shared_prompts.diff"], check=True)
    return script


def their_grpo(steps, group_size=8):
    """The same of TRL: 8 prompts x group_size completions, two updates per batch, KL to a reference."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    def reward(prompts, completions, **kwargs):
        texts = [completion[0]["content"] for completion in completions]
        return [minimal_grpo.score(t, answers[p[1]["content"]])["reward"] for t, p in zip(texts, prompts)]

    system = {"role": "system", "content": minimal_grpo.SYSTEM}
    answers = dict(minimal_grpo.TRAIN)
    rows = [{"prompt": [system, {"role": "user", "content": q}]} for q in answers]
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            folder,
            per_device_train_batch_size=8 * group_size,
            num_generations=group_size,
            num_iterations=2,
            max_completion_length=48,
            max_steps=2 * steps,
            beta=0.04,
            loss_type="bnpo",
            learning_rate=0.0,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            repetition_penalty=1.0,
            use_cpu=DEVICE == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_pretrained("tests/tiny-qwen", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained("tests/tiny-qwen", padding_side="left")
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train()
    return [
        b - a for a, b in zip(marks[1::2], marks[3::2])
    ]  # from one batch's second update to the next one's


def profile(model, tokenizer, batches=10):
    """Where the time of our own sampler and of a GRPO batch (8 x 8, two updates) goes, in percent."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    spent = dict.fromkeys(["in the model", "reference", "forward", "backward", "optimizer"], 0.0)

    def clocked(name, function):
        def run(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            spent[name] += time.perf_counter() - start
            return result

        return run

    forward, model.forward = model.forward, clocked("in the model", model.forward)
    for rows in (8, 64):
        prompts = [f"What is {i % 10} + {i // 10}?" for i in range(rows)]
        minimal_grpo.sample(model, tokenizer, prompts, 48)
        spent["in the model"] = 0.0
        seconds = timed(lambda: [minimal_grpo.sample(model, tokenizer, prompts, 48) for _ in range(batches)])
        print(
            f"sampling {rows} rows: {100 * spent['in the model'] / seconds:.0f} % in the model's forward pass"
        )
    model.forward = forward
    reference, old_logp = copy.deepcopy(model), None
    optimizer = torch.optim.Adam(model.parameters(), 0.0, fused=True)
    prompts = [f"What is {i // 8} + {i // 8}?" for i in range(64)]
    advantages = torch.randn(64, 1, device=DEVICE)
    sampling = 0.0
    for _ in range(batches):
        start = time.perf_counter()
        _, ids, attn, mask, _ = minimal_grpo.sample(model, tokenizer, prompts, 48)
        sampling += time.perf_counter() - start
        with torch.no_grad():
            ref_logp = clocked("reference", minimal_grpo.completion_logp)(reference, ids, attn, mask)
        for epoch in range(2):
            logp = clocked("forward", minimal_grpo.completion_logp)(model, ids, attn, mask)
            old_logp = logp.detach() if epoch == 0 else old_logp
            token_loss, _ = minimal_grpo.grpo_loss(logp, old_logp, ref_logp, advantages, 0.2, 0.04)
            optimizer.zero_grad()
            clocked("backward", ((token_loss * mask).sum() / mask.sum()).backward)()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            clocked("optimizer", optimizer.step)()
    del spent["in the model"]
    spent = {"sampling": sampling, **spent}
    shares = [f"{name} {100 * x / sum(spent.values()):.0f} %" for name, x in spent.items()]
    print("a GRPO batch of 8 x 8:", ", ".join(shares), flush=True)


def peak_memory(folder, size):
    """MiB at most while gsm8k_grpo.py takes a step on 16 completions of 128 tokens; on a CPU of the whole process."""
    flags = "--steps 1 --eval-size 1 --batch-size 2 --max-new-tokens 128".split()
    run = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    run += "; print(open('/proc/self/status').read())"  # ru_maxrss would begin with this process's own
    flags += ["--model", folder, "--dataset", "tests/tiny-gsm8k", "--micro-batch-size", str(size)]
    command = [sys.executable, "-c", run, "gsm8k_grpo.py", *flags]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if DEVICE == "cuda":
        return 1024 * float(out.split("peak GPU memory: ")[1].split()[0])
    return float(out.split("VmHWM:")[1].split()[0]) / 1024


def main():
    print(f"{DEVICE}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    if DEVICE == "cuda":
        print(torch.cuda.get_device_name())
    print(f"{'':<52}{'ours':>11}{'theirs':>11} {'':<9}{'ratio':>6}")
    tokenizer = AutoTokenizer.from_pretrained("tests/tiny-qwen", padding_side="left")
    tiny = AutoModelForCausalLM.from_pretrained("tests/tiny-qwen", dtype=torch.float32).to(DEVICE)
    sampling("0.9 M", tiny, tokenizer)
    profile(tiny, tokenizer)
    shape = dict(HALF_BILLION)
    name = "0.5 B"
    if DEVICE == "cpu":  # its vocabulary alone, for the memory: that is what the logits are large by
        shape |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 2}
        name = "10 M, large vocabulary"
    with torch.device(DEVICE):
        large = Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
    if DEVICE == "cuda":
        sampling(name, large, tokenizer)
    with contextlib.suppress(ImportError), tempfile.TemporaryDirectory() as folder:
        shared, each = shared_prompts(folder), []
        for group_size, rounds in ((4, 2), (8, 5), (16, 2), (32, 2)):
            ours, ours_shared, theirs = [], [], []
            for _ in range(rounds):  # in turn; the medians are over three batches per round
                ours += ours_grpo("minimal_grpo.py", 4, group_size)
                ours_shared += ours_grpo(shared, 4, group_size)
                theirs += their_grpo(4, group_size)
            if group_size == 8:
                row("0.9 M: a GRPO batch of 8 x 8, ours / TRL", ours, theirs, "seconds", False)
                row("0.9 M: the same, shared prompts / TRL", ours_shared, theirs, "seconds", False)
            each.append((group_size, *(statistics.median(x) for x in (ours, ours_shared, theirs))))
        for group_size, *seconds in each:
            times = [f"{1000 * s / (8 * group_size):.1f}" for s in seconds]
            print(
                f"milliseconds per completion, groups of {group_size}: base, shared, TRL", *times, flush=True
            )
    with tempfile.TemporaryDirectory() as folder:
        large.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        large.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del large
        few, whole = [], []
        for _ in range(RUNS if DEVICE == "cuda" else 2):
            few.append(peak_memory(folder, 2))
            whole.append(peak_memory(folder, 16))
    row(f"{name}: GSM8K step, micro-batches of 2 / of 16", few, whole, "MiB", more_is_better=False)


if __name__ == "__main__":
    main()

"""Runs the scripts on the bundled models and writes what the READMEs say of them: tests/results.json and the figures.

uv run tests/measure.py LOGS                   all runs, two processes of one thread at a time (JOBS=1: one), logs into the folder
                                               LOGS; then each script once alone, for its seconds
uv run tests/measure.py LOGS exercise seconds  only what starts so
uv run tests/measure.py real QWEN SMOLLM       two real models (Hub ids or folders): the sums on the first, the texts on the second

Every run is the script itself, with its default flags but for those named here. Into the four arithmetic scripts a few lines are
put: after each step they sample one completion for each of the 100 sums, and eight for one prompt, with random numbers of their own. The
exercises of the README are the script with a few lines changed, named below.

The real runs go one after the other, with one thread per core, and take hours on a CPU. Each leaves its log in tests/real/, without most
of the completions. A run whose log is there is not done again, so the command can be stopped and given again.
"""

import ast
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests/results.json"

PROBE = """\
            with torch.random.fork_rng():
                torch.manual_seed(1000 * (args.seed + 1) + step)
                probed = sample(model, tokenizer, [p for p, _ in TEST], args.max_new_tokens)[0]
                right = [score(t, a)["reward"] for t, (_, a) in zip(probed, TEST)]
                group = sample(model, tokenizer, ["What is 9 + 9?"] * 8, args.max_new_tokens)[0]
            print(json.dumps({"step": step, "sampled": sum(right) / len(right), "group": group}), file=log)
"""

ARITHMETIC = "minimal_sft minimal_dpo minimal_grpo minimal_ppo".split()
GSM8K = ["gsm8k_grpo", "gsm8k_sft_grpo"]
LEXICAL = {f"reinforce-{b}": f"--baseline {b}" for b in ("none", "mean", "ema", "scst")}
LEXICAL |= {"reinforce-gamed": "--brevity-penalty-scale 0", "rloo": ""}
SCORE = '{"reward": float(one_pair and f"<answer>{answer}</answer>" in text)}'
RIGHT = '"right": float(one_pair and f"<answer>{answer}</answer>" in text)}'
LEXICAL_REWARD = '"reward": reward,'

# name: script, flags, changes of its text as (old, new)
EXERCISES = {
    "one_update": ("minimal_grpo", "--update-epochs 1", []),
    "tags_only": ("minimal_grpo", "", [(SCORE, '{"reward": float(one_pair), ' + RIGHT)]),
    "no_critic": ("minimal_ppo", "--critic-lr 0", []),
    "shifted_none": (
        "reinforce",
        "--baseline none",
        [(LEXICAL_REWARD, '"reward": reward - 1,')],
    ),
    "shifted_mean": (
        "reinforce",
        "--baseline mean",
        [(LEXICAL_REWARD, '"reward": reward - 1,')],
    ),
}
REAL = {  # the model's place among the arguments, flags
    "minimal_sft": (0, ""),
    "minimal_dpo": (0, ""),
    "minimal_grpo": (0, ""),
    "minimal_ppo": (0, ""),
    "reinforce": (1, ""),
    "rloo": (1, ""),
}
YOURS = [  # "Make it yours" in the README
    ("Give the result in XML tags.", "Answer in a sentence."),
    (
        "TEST = TRAIN  # nothing is held out: the model can already add, and only has to learn the tags\n",
        "random.Random(0).shuffle(TRAIN)\nTRAIN, TEST = TRAIN[:80], TRAIN[80:]\n",
    ),
    (SCORE, '{"reward": float(text == f"The sum is {answer}."), "characters": len(text)}'),
]


def jobs():
    """(name, seed, script, flags, changes) of every run."""
    probe = "            history.append(record)\n"
    for script in ARITHMETIC:
        for seed in range(5):
            yield script, seed, script, "", [(probe, probe + PROBE)]
    for name, flags in LEXICAL.items():
        for seed in range(5):
            yield name, seed, name.split("-")[0], flags, []
    for script in GSM8K:
        for seed in range(3):
            yield script, seed, script, "", []
    for seed in range(3):
        yield "yours", seed, "minimal_grpo", "", YOURS
        for name, (script, flags, changes) in EXERCISES.items():
            yield f"exercise-{name}", seed, script, flags, changes


def run(folder, name, seed, script, flags, changes, threads="1"):
    """One run: its records, with the text that is printed below each evaluation; the seconds from the first evaluation to
    the last step; and the peak memory in GiB."""
    source = (ROOT / f"{script}.py").read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{name}: {old!r} stands in {script}.py {source.count(old)} times"
        source = source.replace(old, new)
    path, log = folder / f"{name}.py", folder / f"{name}-{seed}.jsonl"
    path.write_text(source)
    command = [sys.executable, path, *flags.split(), "--seed", seed, "--log", log]
    started, ended, examples = None, None, []
    with subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("    "):  # the example below an evaluation
                started = started or time.perf_counter()
                examples.append([ast.literal_eval(part) for part in line.strip().split(" -> ", 1)])
            if line.startswith("step "):
                ended = time.perf_counter()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{name}, seed {seed}"
    records = []
    for line in log.read_text().splitlines():
        records.append(json.loads(line))
        if "eval" in records[-1]:
            prompt, text = examples.pop(0)
            records.append({"step": records[-1]["step"], "example": {"prompt": prompt, "text": text}})
    seconds = ended - started
    evaluations = [record["eval"] for record in records if "eval" in record]
    print(f"{name}, seed {seed}: {evaluations[0]} to {evaluations[-1]}, {seconds:.1f} s", flush=True)
    return records, seconds, usage.ru_maxrss / 2**20  # which Linux gives in KiB


def summary(runs):
    """What the READMEs need of one script's seeds: evaluations, seconds, means over the steps."""
    evaluations = [[r["eval"] for r in records if "eval" in r] for records, *_ in runs]
    steps = [[r for r in records if "grad_norm" in r] for records, *_ in runs]
    result = {"evaluations": evaluations}
    for metric in ("reward", "clip_frac", "grad_norm"):
        if all(metric in r for run in steps for r in run):
            result[metric] = [statistics.mean(r[metric] for r in run) for run in steps]
    if all("reward" in r for run in steps for r in run):
        result["last_reward"] = [statistics.mean(r["reward"] for r in run[-5:]) for run in steps]
    return result


def real(models):
    """The real runs that are still missing, then what the READMEs need of all of them."""
    for seed in range(2):
        for script, (place, flags) in REAL.items():
            path = ROOT / f"tests/real/{script}-{seed}.jsonl"
            if path.exists():
                continue
            with tempfile.TemporaryDirectory() as folder:
                job = (script, seed, script, f"{flags} --model {models[place]}", [], str(os.cpu_count()))
                records, seconds, peak = run(Path(folder), *job)
            steps = [record for record in records if "grad_norm" in record]
            for record in steps[1:-1]:
                record.pop("samples", None)
            for record in (steps[0], steps[-1]):
                if "samples" in record:
                    record["samples"] = record["samples"][:8]
            records.append({"seconds_per_step": round(seconds / len(steps), 1), "peak_gib": round(peak, 1)})
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            write_real()


def write_real():
    """The real runs of tests/real/ into results.json: evaluations, each step's metrics, seconds and memory."""
    results = json.loads(RESULTS.read_text())
    results["real"] = {}
    for script in REAL:
        runs = []
        for path in sorted((ROOT / "tests/real").glob(f"{script}-?.jsonl")):
            records = [json.loads(line) for line in path.read_text().splitlines()]
            steps = [record for record in records if "grad_norm" in record]
            runs.append({"evaluations": [record["eval"] for record in records if "eval" in record]})
            for metric in ("reward", "kl", "finished", "words", "ttr"):
                if metric in steps[0]:
                    runs[-1][metric] = [record[metric] for record in steps]
            runs[-1] |= records[-1] if "peak_gib" in records[-1] else {}
        results["real"][script] = runs
    write(results)


def main():
    if sys.argv[1] == "real":
        return real(sys.argv[2:])
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wanted = [job for job in jobs() if job[0].startswith(tuple(sys.argv[2:]) or "")]
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("JOBS", 2))) as pool:
        done = [(job[0], pool.submit(run, folder, *job)) for job in wanted]
        for name in dict.fromkeys(name for name, _ in done):
            results[name] = summary([future.result() for other, future in done if other == name])
            write(results)
    if "seconds".startswith(tuple(sys.argv[2:]) or ""):
        threads, results["seconds"] = str(os.cpu_count()), {}
        for script in [*ARITHMETIC, "reinforce", "rloo", *GSM8K]:
            results["seconds"][script] = round(run(folder, "seconds", 0, script, "", [], threads)[1], 1)
        write(results)


def write(results):
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

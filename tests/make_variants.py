"""Measures the variants and writes tests/variants/README.md from the diffs and from what was measured.

uv run --with gymnasium tests/make_variants.py  runs every variant on seeds 0 to 2, two processes at a time
uv run tests/make_variants.py gspo raft         runs these
uv run tests/make_variants.py --write           runs nothing, only writes the files again
"""

import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests/variants"
RESULTS = FOLDER / "results.json"
MEASURED = "Measured on the bundled model, seeds 0 to 2: "
SEEDS = range(3)
JOBS = int(os.environ.get("JOBS", 2))  # processes at a time
NAMES = {
    "ttr": "type-token ratio",
    "return": "mean return",
    "lost": "share of 200 games lost to a random player",
    "reward": "accuracy",
}  # what is evaluated, whichever the script logs
NEED_A_REAL_MODEL = {"letter_counting", "reasoning_gym_grpo"}

INTRO = """\
# Variants, each as a diff

Most newer algorithms are a few dozen changed lines of one of the eight scripts. Here each of them is a patch, with the reason for it, its paper, and what
was measured. The patched file is complete: docstring, formula, flags and help are its own.

    cp minimal_grpo.py dr_grpo.py && patch dr_grpo.py tests/variants/dr_grpo.diff && uv run dr_grpo.py

`on_policy_distillation` needs a teacher first: `uv run minimal_sft.py --save teacher`. The description of `torchrun` says how to start it.

Before and after: accuracy (`actor_critic`: type-token ratio of the first 40 words; `gymnasium_ppo`: mean return of 20 greedy episodes; `tic_tac_toe`: share of 200 games *lost*), sampled
at temperature 1 (variants of the GSM8K scripts, and `tic_tac_toe`: greedy), on the bundled models with default flags, seeds 0 to 2; before: seed 0 (`torchrun`: two processes, so twice the base's batch). Seconds are those of the whole process, with one thread each and two processes at a time (`gymnasium_ppo` and
`tic_tac_toe`: up to three; `torchrun`: four).
`uv run --with gymnasium tests/make_variants.py` measures all of it and writes this page.

## What you may want

- **Another loss or advantage for GRPO**: [dr_grpo](#dr_grpo) without its biases, [dapo](#dapo) with four repairs, [maxrl](#maxrl) for prompts that are rarely
  solved, [reinforce_plus_plus](#reinforce_plus_plus) normalized over the batch, [gspo](#gspo) with one ratio per completion, [cispo](#cispo) and [sapo](#sapo) with softer clips.
- **Something simpler than GRPO**: [raft](#raft) imitates what was right, [plain](#plain) is what is left when everything goes that the bundled GSM8K problems can do without.
- **A learned baseline without PPO**: [actor_critic](#actor_critic).
- **Another loss for pairs**: [ipo](#ipo), [simpo](#simpo) without a reference; [online_dpo](#online_dpo) makes the pairs itself.
- **No reward at hand**: [reward_model](#reward_model) learns one from comparisons, [on_policy_distillation](#on_policy_distillation) takes a teacher.
- **Less memory**: [lora](#lora); [bf16](#bf16), with gradient checkpointing; its memory is not measured.
- **Less time**: [shared_prompts](#shared_prompts), [cuda_graph](#cuda_graph); more GPUs: [torchrun](#torchrun).
- **Another task**: [letter_counting](#letter_counting), [reasoning_gym_grpo](#reasoning_gym_grpo) with a hundred of them.
- **A tool or a game**: [calculator](#calculator); [gymnasium_ppo](#gymnasium_ppo), CartPole and its like played in text; [tic_tac_toe](#tic_tac_toe) against itself.

These numbers show that the code learns; they do not rank the methods. With one update per batch all ratios are 1, with two most are near 1, and
there the policy-gradient losses differ mainly in how they weigh groups and lengths, so their curves look alike.

## Where they differ: eight updates per batch

![Reward by step of GRPO, Dr. GRPO, GSPO, CISPO and SAPO with eight updates per batch](epochs.png)

With `--update-epochs 8`, the last updates of a batch are far off policy, which shows how each loss restrains them. Five seeds, default flags
otherwise; of the five losses, only GRPO's has a KL penalty by default. The band is the lowest and highest seed.

- GRPO, the only one with a KL term, ends at 0.96 to 1.00, and from step 4 on no batch falls below 0.82.
- Dr. GRPO without the KL term ends at 0.93 to 1.00. After step 4 single batches drop as low as 0.55. (Before the warm-up was added to the scripts, one seed of five lost all
  reward in step 4; with none left, all advantages are 0, and it never came back.)
- GSPO ends at 0.99 to 1.00. It is the slowest in steps 1 to 4 and the steadiest from step 10 on, with no batch below 0.96: its clip range is so narrow that, over the run,
  0.27 to 0.29 of the completions are held back in the last update of a batch (GRPO: 0.01 to 0.02 of the tokens).
- CISPO and SAPO have no hard clip that switches a token off. Single batches drop as low as 0.06 and 0.41 after step 4; they end at 0.94 to 0.99 and 0.97 to 1.00.
- This is one easy task, one learning rate and a tiny model, and nothing was tuned for any of the five.

Made by

    mkdir logs && cp minimal_grpo.py logs/grpo.py
    for v in dr_grpo gspo cispo sapo; do cp minimal_grpo.py logs/$v.py && patch logs/$v.py tests/variants/$v.diff; done
    for v in grpo dr_grpo gspo cispo sapo; do for i in 0 1 2 3 4; do uv run logs/$v.py --update-epochs 8 --micro-batch-size 64 --seed $i --log logs/$v-$i.jsonl; done; done
    uv run tests/plot.py tests/variants/epochs.png "GRPO=logs/grpo-*.jsonl" "Dr. GRPO=logs/dr_grpo-*.jsonl" "GSPO=logs/gspo-*.jsonl" "CISPO=logs/cispo-*.jsonl" "SAPO=logs/sapo-*.jsonl"

## All of them

To update a variant after a change to its base, see [Contributing](../README.md#contributing).
"""


def parts(diff):
    """The text above the diff, its base, and the changed lines."""
    text = diff.read_text()
    head, body = text.split("--- a/", 1)
    base = body.split("\n", 1)[0]
    changed = [line for line in body.splitlines() if line[:1] in "+-" and not line.startswith("+++ ")]
    return head.strip(), base, changed


def first_sentence(head):
    """What the variant is, on one line."""
    paragraph = " ".join(head.split("\n\n")[0].split())
    return re.match(r".*?[.](?= [A-Z1]|$)(?<!Dr\.)", paragraph)[0]


def papers(head):
    return (
        ", ".join(f"[{n}](https://arxiv.org/abs/{n})" for n in re.findall(r"\b\d{4}\.\d{5}\b", head)) or "-"
    )


def numbers(result):
    """Before and after, as text: shares with two decimals, returns with none."""
    digits = 0 if result["name"] == "mean return" else 2
    return [f"{x:.{digits}f}" for x in (result["before"], *result["after"])]


def measured_line(result):
    before, *after = numbers(result)
    return f"{MEASURED}{result['name']} {before} before, {' '.join(after)} after."


def write():
    """Writes the measured line of each diff and the README."""
    results = json.loads(RESULTS.read_text())
    rows = [
        "| variant | of | what it is | changed lines | papers | before | after | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    blocks = []
    for diff in sorted(FOLDER.glob("*.diff")):
        text, columns = diff.read_text(), "- | - | -"
        if diff.stem not in NEED_A_REAL_MODEL:
            result = results[diff.stem]
            line = measured_line(result)
            text = re.sub(r"Measured on the bundled model.*", lambda _: line, text, count=1)
            before, *after = numbers(result)
            low, high = min(result["seconds"]), max(result["seconds"])
            columns = f"{before} | {' '.join(after)} | {low:.0f} to {high:.0f}"
        diff.write_text(text)
        head, base, changed = parts(diff)
        name = f"[{diff.stem}](#{diff.stem})"
        rows.append(
            f"| {name} | `{base}` | {first_sentence(head)} | {len(changed)} | {papers(head)} | {columns} |"
        )
        blocks.append(f"## {diff.stem}\n\n```diff\n{text}```\n")
    (FOLDER / "README.md").write_text("\n".join([INTRO, *rows, "", *blocks]))


def run(name, seed, teacher):
    """One variant on one seed: the evaluation before and after, and the seconds of the process."""
    diff = FOLDER / f"{name}.diff"
    with tempfile.TemporaryDirectory() as folder:
        script, log = Path(folder) / f"{name}.py", Path(folder) / "log"
        script.write_text((ROOT / parts(diff)[1]).read_text())
        subprocess.run(["patch", "--silent", script, diff], check=True)
        command = [sys.executable]
        if name == "torchrun":
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
        command += [script, "--seed", seed, "--log", log]
        if name == "on_policy_distillation":
            command += ["--teacher", teacher]
        start = time.time()
        done = subprocess.run(
            [*map(str, command)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        seconds = time.time() - start
        assert done.returncode == 0, f"{name}, seed {seed}: {done.stderr[-2000:]}"
        evaluations = [json.loads(line) for line in log.read_text().splitlines() if '"eval"' in line]
    score = next(name for name in NAMES if name in evaluations[0]["eval"])
    before, after = evaluations[0]["eval"][score], evaluations[-1]["eval"][score]
    print(f"{name}, seed {seed}: {score} {before:.3f} to {after:.3f}, {seconds:.0f} s", flush=True)
    return {
        "name": NAMES[score],
        "before": before,
        "after": after,
    }, seconds


def main():
    names = [name for name in sys.argv[1:] if name != "--write"]
    if "--write" not in sys.argv:
        everything = {diff.stem for diff in FOLDER.glob("*.diff")}
        names = names or sorted(everything - NEED_A_REAL_MODEL)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        with tempfile.TemporaryDirectory() as teacher, concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
            command = [sys.executable, "minimal_sft.py", "--save", teacher]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            jobs = {name: [pool.submit(run, name, seed, teacher) for seed in SEEDS] for name in names}
            for name, done in jobs.items():
                runs = [job.result() for job in done]
                results[name] = runs[0][0] | {"after": [result["after"] for result, _ in runs]}
                results[name]["seconds"] = [round(seconds, 1) for _, seconds in runs]
                RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    write()


if __name__ == "__main__":
    main()

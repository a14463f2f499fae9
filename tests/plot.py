"""Draws --log files as learning curves: mean over the seeds as a line, their range as a band; in the legend the evaluations' means.

uv run tests/plot.py OUT.png "GRPO=grpo-*.jsonl" "PPO=ppo-*.jsonl"              a panel each
uv run tests/plot.py OUT.png --together "mean=mean-*.jsonl" "none=none-*.jsonl"  one panel for all
"""

import argparse
import glob
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {  # the first of these that a log has is drawn; the name of its axis
    "reward": "mean reward of the batch (sampled)",
    "margin": "mean margin of the pairs",
    "loss": "cross-entropy, nats per token",
}


def read(pattern):
    """The step records and the evaluations of each file that fits the pattern."""
    paths = sorted(glob.glob(pattern))
    assert paths, f"no file fits {pattern}"
    runs = [[json.loads(line) for line in Path(path).read_text().splitlines()] for path in paths]
    # SFT before GRPO has steps, too; those of the last phase are drawn.
    phases = [next((r.get("phase") for r in reversed(run) if "eval" not in r), None) for run in runs]
    steps = [[r for r in run if "eval" not in r and r.get("phase") == p] for run, p in zip(runs, phases)]
    return steps, [[r["eval"] for r in run if "eval" in r] for run in runs]


def draw(axes, pattern, color):
    """One series into one panel; gives the name of the y axis and, of the evaluations, 'accuracy 0.25 → 1.00'."""
    steps, evaluations = read(pattern)
    key = next(key for key in NAMES if key in steps[0][0])
    curves = list(zip(*[[r[key] for r in run] for run in steps]))  # for each step the values of the seeds
    (line,) = axes.plot([sum(c) / len(c) for c in curves], color=color)
    low, high = [min(c) for c in curves], [max(c) for c in curves]
    axes.fill_between(range(len(curves)), low, high, color=color, alpha=0.2, linewidth=0)
    score = "reward"
    means = [sum(e[score] for e in times) / len(times) for times in zip(*evaluations)]
    return NAMES[key], line, f"{score} " + " → ".join(f"{mean:.2f}" for mean in means)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("series", nargs="+", metavar="LABEL=GLOB")
    parser.add_argument("--together", action="store_true")
    args = parser.parse_args()
    columns = 1 if args.together else len(args.series)
    width = 7.5 if args.together else 2.9 * columns
    figure, panels = plt.subplots(1, columns, figsize=(width, 3.4), squeeze=False, layout="constrained")
    lines, labels = [], []
    for i, series in enumerate(args.series):
        label, pattern = series.split("=", 1)
        axes = panels[0][0 if args.together else i]
        name, line, scores = draw(axes, pattern, f"C{i}")
        lines.append(line)
        labels.append(f"{label}: {scores}")
        axes.set(xlabel="step", ylabel=name)
        axes.set_ylim(0, 1.02 if "reward" in name else None)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if not args.together:
            axes.set_title(f"{label}\n{scores} (greedy)", fontsize=9)
    if args.together:
        axes.legend(lines, labels, title="evaluation, greedy", frameon=False, loc="lower right", fontsize=9)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()

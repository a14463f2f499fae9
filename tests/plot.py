"""Draws --log files as learning curves: the mean over the seeds as a line, their range as a band, evaluations as dots.

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

NAMES = {  # what is drawn, the first that a log has: its records' key, the axis, the evaluations' key
    "reward": ("mean reward of the batch", "reward"),
    "margin": ("mean margin of the pairs", None),
    "loss": ("cross-entropy, nats a token", None),
}


def read(pattern):
    """The step records and the evaluations of each file that fits the pattern."""
    runs = [
        [json.loads(line) for line in Path(path).read_text().splitlines()]
        for path in sorted(glob.glob(pattern))
    ]
    assert runs, f"no file fits {pattern}"
    steps = [[r for r in run if "seconds" in r] for run in runs]
    return steps, [[r for r in run if "eval" in r] for run in runs]


def draw(axes, label, pattern, color):
    """One series into one panel; gives the label of the y axis."""
    steps, evaluations = read(pattern)
    key = next(key for key in NAMES if key in steps[0][0])
    curves = list(
        zip(*[[r[key] for r in run] for run in steps])
    )  # a tuple of the seeds' values for each step
    x = range(1, len(curves) + 1)
    axes.plot(x, [sum(c) / len(c) for c in curves], color=color, label=label)
    axes.fill_between(
        x, [min(c) for c in curves], [max(c) for c in curves], color=color, alpha=0.2, linewidth=0
    )
    for run in evaluations if key == "reward" else []:
        for r in run:
            value = r["eval"].get("accuracy", r["eval"].get("reward"))
            sft = r.get("phase") == "sft"
            axes.plot(
                r["step"], value, "s" if sft else "o", color=color, markersize=4, clip_on=False, zorder=3
            )
    return NAMES[key][0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("series", nargs="+", metavar="LABEL=GLOB")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    series = [s.split("=", 1) for s in args.series]
    columns = 1 if args.together else len(series)
    width = 7 if args.together else 2.9 * columns
    figure, panels = plt.subplots(1, columns, figsize=(width, 3.4), squeeze=False, layout="constrained")
    for i, (label, pattern) in enumerate(series):
        axes = panels[0][0 if args.together else i]
        name = draw(axes, label, pattern, f"C{i}")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if "reward" in name:
            axes.set_ylim(0, 1.02)
        axes.set_ylabel(name)
        if not args.together:
            axes.set_title(label, fontsize=10)
    if args.together:
        figure.legend(frameon=False, loc="outside right upper")
    figure.suptitle(args.title, fontsize=11)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()

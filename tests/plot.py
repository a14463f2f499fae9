"""Draws --log files as learning curves in one picture: for each label the mean of its files as a line, their range as a band.

uv run tests/plot.py OUT.png "my run=log.jsonl"
uv run tests/plot.py OUT.png --metric kl "beta 0.04=a-*.jsonl" "beta 0.4=b-*.jsonl"

In the legend, the mean of the evaluations before and after.
"""

import argparse
import glob
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams |= {"font.size": 14, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
plt.rcParams |= {"grid.alpha": 0.3, "savefig.dpi": 120, "savefig.facecolor": "white", "lines.linewidth": 2.2}
COLORS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#8e63b5", "#999999"]
NAMES = {"reward": "mean reward of the batch", "margin": "mean margin of the pairs", "loss": "loss"}


def read(pattern, metric):
    """The metric at each step, and the evaluations, of each file that fits the pattern."""
    paths = sorted(glob.glob(pattern))
    assert paths, f"no file fits {pattern}"
    curves, evaluations = [], []
    for path in paths:
        records = [json.loads(line) for line in Path(path).read_text().splitlines()]
        evaluations.append([r["eval"]["reward"] for r in records if "eval" in r])
        steps = [r for r in records if "eval" not in r]
        # SFT before GRPO has steps, too: those of the last phase are drawn.
        steps = [r for r in steps if r.get("phase") == steps[-1].get("phase")]
        metric = metric or next(name for name in NAMES if name in steps[0])
        curves.append([r[metric] for r in steps])
    return curves, evaluations, metric


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("series", nargs="+", metavar="LABEL=GLOB")
    parser.add_argument("--metric", help="a name in the log; without it reward, margin or loss")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for color, series in zip(COLORS, args.series):
        label, pattern = series.split("=", 1)
        curves, evaluations, metric = read(pattern, args.metric)
        steps = list(zip(*curves))  # for each step the values of the files
        means = [sum(times) / len(times) for times in zip(*evaluations)]
        label += ": " + " → ".join(f"{mean:.2f}" for mean in means)
        axes.plot([sum(values) / len(values) for values in steps], color=color, label=label)
        low, high = [min(values) for values in steps], [max(values) for values in steps]
        axes.fill_between(range(len(steps)), low, high, color=color, alpha=0.18, linewidth=0)
    axes.set(xlabel="step", ylabel=NAMES.get(metric, metric))
    axes.legend(title="reward when evaluated", frameon=False, fontsize=12, title_fontsize=12)
    figure.savefig(args.out)


if __name__ == "__main__":
    main()

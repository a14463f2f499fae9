"""Draws the READMEs' figures from the logs that tests/measure.py leaves: uv run tests/figures.py LOGS
The one of the real models comes from tests/real/ and needs no LOGS.
"""

import json
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURES = Path(__file__).parent / "figures"
REAL = Path(__file__).parent / "real"
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8e63b5", "#999999"
plt.rcParams |= {"font.size": 14, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
plt.rcParams |= {"grid.alpha": 0.3, "savefig.dpi": 120, "savefig.facecolor": "white", "lines.linewidth": 2.2}


def logs(folder, name):
    """The records of each seed."""
    paths = sorted(folder.glob(f"{name}-?.jsonl"))
    assert paths, f"no {name}-*.jsonl in {folder}"
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def band(axes, x, runs, color, label):
    """The seeds' mean as a line and their range as a band. runs: a list of values for each seed."""
    columns = list(zip(*runs, strict=True))
    axes.plot(x, [sum(c) / len(c) for c in columns], color=color, label=label)
    axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.18, lw=0)


def methods(folder):
    """The four arithmetic methods: correct sampled answers against completions trained on."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    per_step = {"minimal_sft": (8, GREEN), "minimal_dpo": (16, ORANGE)}
    per_step |= {"minimal_grpo": (64, BLUE), "minimal_ppo": (64, PURPLE)}
    for name, (completions, color) in per_step.items():
        runs = [[r["sampled"] for r in run if "sampled" in r] for run in logs(folder, name)]
        x = [completions * (step + 1) for step in range(len(runs[0]))]
        band(axes, x, runs, color, name.removeprefix("minimal_").upper())
    axes.set(xscale="log", xlabel="completions trained on (given or sampled)", ylim=(0, 1.02))
    axes.set_xticks([8, 16, 32, 64, 128, 256, 512, 1024, 1920])
    axes.set_xticklabels(["8", "16", "32", "64", "128", "256", "512", "1024", "1920"], fontsize=12)
    axes.minorticks_off()
    axes.set_ylabel("correct sampled answers")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(FIGURES / "methods.png")


STYLES = {  # each text counts for the first pattern that it matches
    "<answer>18</answer>": (r"<answer>\d+</answer>", BLUE),
    "<answer>9 + 9 = 18</answer>": (r"<answer>\d \+ \d = \d+</answer>", "#7fbfe5"),
    "<result>18</result>": (r"<result>\d+</result>", ORANGE),
    "```xml <result>18</result> ```": (r"```xml\n<result>\d+</result>\n```", "#f3cf7f"),
    "<sum>18</sum>": (r"<sum>\d+</sum>", PURPLE),
    "The sum is 18.": (r"The sum is \d+\.", GREEN),
    "anything else": (r".*", GREY),
}


def style(text):
    return next(
        name for name, (pattern, _) in STYLES.items() if re.fullmatch(pattern, text.strip(), re.DOTALL)
    )


def styles(folder):
    """What GRPO does to the way the model answers; below it, one prompt's completions at four steps."""
    runs = logs(folder, "minimal_grpo")
    steps = [[r for r in run if "samples" in r] for run in runs]
    shares = {name: [] for name in STYLES}
    for at_step in zip(*steps, strict=True):
        texts = [style(sample["text"]) for record in at_step for sample in record["samples"]]
        for name in STYLES:
            shares[name].append(texts.count(name) / len(texts))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 8), layout="constrained", height_ratios=(1.25, 1))
    colors = [color for _, color in STYLES.values()]
    top.stackplot(range(len(steps[0])), *shares.values(), labels=STYLES, colors=colors, lw=0)
    top.set(xlabel="step of GRPO", ylim=(0, 1), xlim=(0, len(steps[0]) - 1))
    top.set_ylabel("share of sampled completions")
    top.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    handles, labels = top.get_legend_handles_labels()
    top.legend(handles[::-1], labels[::-1], loc="lower right", framealpha=0.95, fontsize=13)
    bottom.axis("off")
    bottom.set_title("eight completions of “What is 9 + 9?”, seed 0", fontsize=14, loc="left")
    groups = {r["step"]: Counter(r["group"]) for r in runs[0] if "group" in r}
    for step, (x, y) in {0: (0, 0.95), 5: (0.5, 0.95), 15: (0, 0.4), 29: (0.5, 0.4)}.items():
        bottom.text(
            x,
            y,
            f"after {step + 1} step" + "s" * (step > 0),
            weight="bold",
            va="top",
            transform=bottom.transAxes,
        )
        for row, (text, count) in enumerate(groups[step].most_common(), 1):
            corner = (x, y - 0.1 * row - 0.075)
            patch = plt.Rectangle(
                corner, 0.015, 0.075, color=STYLES[style(text)][1], transform=bottom.transAxes, lw=0
            )
            bottom.add_patch(patch)
            place = {"va": "top", "fontsize": 13, "transform": bottom.transAxes}
            bottom.text(x + 0.03, y - 0.1 * row, count, weight="bold", **place)
            bottom.text(x + 0.07, y - 0.1 * row, text.replace("\n", " "), **place)
    figure.savefig(FIGURES / "styles.png")


def lexical(folder):
    """REINFORCE with its four baselines, and RLOO: the sampled reward."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    series = {"reinforce-none": ("no baseline", RED), "reinforce-mean": ("mean", BLUE)}
    series |= {"reinforce-ema": ("ema", GREEN), "reinforce-scst": ("scst", ORANGE), "rloo": ("RLOO", PURPLE)}
    for name, (label, color) in series.items():
        runs = [[r["reward"] for r in run if "eval" not in r] for run in logs(folder, name)]
        band(axes, range(len(runs[0])), runs, color, label)
    axes.set(xlabel="step", ylabel="mean reward of the batch", ylim=(0, 1.0))
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(FIGURES / "lexical.png")


def gsm8k(folder):
    """The two GSM8K scripts: the sampled reward of GRPO's steps."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for name, color in (("gsm8k_grpo", BLUE), ("gsm8k_sft_grpo", ORANGE)):
        runs = [[r["reward"] for r in run if "samples" in r] for run in logs(folder, name)]
        band(axes, range(len(runs[0])), runs, color, f"{name}.py")
    axes.set(xlabel="step of GRPO", ylabel="mean reward of the batch", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(FIGURES / "gsm8k.png")


def thin_and_thick(axes, runs, color, label):
    """Each seed as a thin line, their mean as a thick one."""
    for run in runs:
        axes.plot(run, color=color, lw=1, alpha=0.6)
    axes.plot([sum(c) / len(c) for c in zip(*runs)], color=color, lw=3, label=label)


def real():
    """What tests/real/ holds: the sums on the left, the texts on the right, a completion before and after below."""

    def steps(name, metric):
        runs = [[r for r in run if metric in r and "eval" not in r] for run in logs(REAL, name)]
        return [[r[metric] for r in run] for run in runs]

    figure, axes = plt.subplot_mosaic(
        "ab;cd;ee", figsize=(9, 9.6), layout="constrained", height_ratios=(3, 2.4, 2.3)
    )
    thin_and_thick(axes["a"], steps("minimal_grpo", "reward"), BLUE, "GRPO")
    thin_and_thick(axes["a"], steps("minimal_ppo", "reward"), PURPLE, "PPO")
    axes["a"].set(title="sums, Qwen2.5-Coder-0.5B", ylabel="correct in the batch", ylim=(0, 1.03))
    axes["a"].legend(frameon=False, loc="lower right")
    thin_and_thick(axes["c"], steps("minimal_sft", "loss"), GREEN, "SFT")
    thin_and_thick(axes["c"], steps("minimal_dpo", "loss"), ORANGE, "DPO")
    axes["c"].set(ylabel="loss", xlabel="step", yscale="log")
    axes["c"].legend(frameon=False)
    for place, metric in (("b", "ttr"), ("d", "words")):
        thin_and_thick(axes[place], steps("reinforce", metric), RED, "REINFORCE")
        thin_and_thick(axes[place], steps("rloo", metric), GREY, "RLOO")
    axes["b"].set(title="texts, SmolLM2-135M", ylabel="distinct words / words\nof the first 40")
    axes["b"].legend(frameon=False, loc="lower right")
    axes["d"].set(xlabel="step", ylabel="words")
    axes["d"].axhline(40, color="black", lw=1, ls=":")
    lines = []
    for name in ("minimal_grpo", "rloo"):
        samples = [r["samples"] for r in logs(REAL, name)[0] if r.get("samples")]
        for when, sample in (("before", samples[0][0]), ("after", samples[-1][0])):
            method = name.removeprefix("minimal_").upper()
            text = f"{method}, {when}: {sample['prompt']} → {sample['text']}".replace("\n", " ")
            lines += textwrap.wrap(text, 92, subsequent_indent="    ", max_lines=4)
    axes["e"].axis("off")
    axes["e"].text(
        0, 1, "\n".join(lines), va="top", fontsize=12, linespacing=1.35, transform=axes["e"].transAxes
    )
    figure.savefig(FIGURES / "real.png")


if __name__ == "__main__":
    real()
    for draw in (methods, styles, lexical, gsm8k) if sys.argv[1:] else ():
        draw(Path(sys.argv[1]))

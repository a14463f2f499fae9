"""Draws the READMEs' figures from the logs that tests/measure.py leaves: uv run tests/figures.py LOGS
The map of the files and those of the real models need no LOGS.
"""

import ast
import difflib
import json
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
FIGURES = Path(__file__).parent / "figures"
REAL = Path(__file__).parent / "real"
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8e63b5", "#999999"
METHOD = {
    "SFT": GREEN,
    "DPO": ORANGE,
    "REINFORCE": RED,
    "RLOO": "#cc79a7",
    "GRPO": BLUE,
    "PPO": PURPLE,
}  # in all figures
plt.rcParams |= {"font.size": 14, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
plt.rcParams |= {"grid.alpha": 0.3, "savefig.dpi": 120, "savefig.facecolor": "white", "lines.linewidth": 2.2}


def logs(folder, name):
    """The records of each seed."""
    paths = sorted(folder.glob(f"{name}-?.jsonl"))
    assert paths, f"no {name}-*.jsonl in {folder}"
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def band(axes, x, runs, color, label, dashes="-"):
    """The seeds' mean as a line and their range as a band. runs: a list of values for each seed."""
    columns = list(zip(*runs, strict=True))
    axes.plot(x, [sum(c) / len(c) for c in columns], color=color, label=label, ls=dashes)
    axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.18, lw=0)


def methods(folder):
    """The four arithmetic methods: correct sampled answers against completions trained on."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for method, completions in {"SFT": 8, "DPO": 16, "GRPO": 64, "PPO": 64}.items():  # per step
        runs = logs(folder, f"minimal_{method.lower()}")
        runs = [[r["sampled"] for r in run if "sampled" in r] for run in runs]
        x = [completions * (step + 1) for step in range(len(runs[0]))]
        band(axes, x, runs, METHOD[method], method)
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
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 7.4), layout="constrained", height_ratios=(1.45, 1)
    )
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
    for step, (x, y) in {0: (0, 0.97), 5: (0.5, 0.97), 15: (0, 0.3), 29: (0.5, 0.3)}.items():
        bottom.text(
            x,
            y,
            f"after {step + 1} step" + "s" * (step > 0),
            weight="bold",
            va="top",
            transform=bottom.transAxes,
        )
        for row, (text, count) in enumerate(groups[step].most_common(), 1):
            corner = (x, y - 0.12 * row - 0.085)
            patch = plt.Rectangle(
                corner, 0.015, 0.085, color=STYLES[style(text)][1], transform=bottom.transAxes, lw=0
            )
            bottom.add_patch(patch)
            place = {"va": "top", "fontsize": 13, "transform": bottom.transAxes}
            bottom.text(x + 0.03, y - 0.12 * row, count, weight="bold", **place)
            bottom.text(x + 0.07, y - 0.12 * row, text.replace("\n", " "), **place)
    figure.savefig(FIGURES / "styles.png")


def lexical(folder):
    """REINFORCE with its four baselines, and RLOO: the sampled reward."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    series = {"reinforce-none": ("no baseline", "#f3b48b", ":"), "reinforce-mean": ("mean", RED, "-")}
    series |= {"reinforce-ema": ("ema", "#8c3d00", "--"), "reinforce-scst": ("scst", "#e0874a", "-.")}
    series |= {"rloo": ("RLOO", METHOD["RLOO"], "-")}
    for name, (label, color, dashes) in series.items():
        runs = [[r["reward"] for r in run if "eval" not in r] for run in logs(folder, name)]
        band(axes, range(len(runs[0])), runs, color, label, dashes)
    axes.set(xlabel="step", ylabel="mean reward of the batch", ylim=(0, 1.0))
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(FIGURES / "lexical.png")


def gsm8k(folder):
    """The two GSM8K scripts: the sampled reward of GRPO's steps."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for name, dashes in (("gsm8k_grpo", "-"), ("gsm8k_sft_grpo", "--")):
        runs = [[r["reward"] for r in run if "samples" in r] for run in logs(folder, name)]
        band(axes, range(len(runs[0])), runs, METHOD["GRPO"], f"{name}.py", dashes)
    axes.set(xlabel="step of GRPO", ylabel="mean reward of the batch", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(FIGURES / "gsm8k.png")


READ_AFTER = {  # the reading path: each file, and the one that it is compared with
    "minimal_sft": None,
    "minimal_dpo": "minimal_sft",
    "reinforce": "minimal_dpo",
    "rloo": "reinforce",
    "minimal_grpo": "rloo",
    "minimal_ppo": "minimal_grpo",
    "gsm8k_grpo": "minimal_grpo",
    "gsm8k_sft_grpo": "gsm8k_grpo",
}
BANDS = [
    "formula",
    "imports",
    "flags",
    "task",
    "sampling,\nlog-probs",
    "evaluation",
    "algorithm",
    "setup",
    "loop",
]


def band_of_lines(text):
    """For each line of a script the place in BANDS that it belongs to."""
    starts = {1: "imports"}  # the header of the dependencies, too
    for node in ast.parse(text).body:
        name = getattr(node, "name", "") or (node.targets[0].id if isinstance(node, ast.Assign) else "")
        if isinstance(node, ast.Expr) and node.lineno < 10:
            starts[node.lineno], starts[node.end_lineno + 1] = "formula", "imports"
        elif name == "Args":
            starts[node.lineno - 1] = "flags"
            starts[node.end_lineno + 1] = "task"
        elif name in ("encode_prompts", "mean_scores"):
            starts[node.lineno] = {"encode_prompts": "sampling,\nlog-probs"}.get(name, "evaluation")
        elif name == "evaluate":
            starts[node.end_lineno + 1] = "algorithm"
        elif isinstance(node, ast.If) and node.test.__class__ is ast.Compare and "__main__" in ast.dump(node):
            starts[node.lineno] = "setup"
            starts[next(child.lineno for child in node.body if isinstance(child, ast.Try))] = "loop"
    bands, current = [], None
    for line in range(1, len(text.splitlines()) + 1):
        current = starts.get(line, current)
        bands.append(BANDS.index(current))
    return bands


def new_lines(script, earlier):
    """For each line of the script whether the file that it is read after lacks it."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    old = (ROOT / f"{earlier}.py").read_text().splitlines() if earlier else []
    new = [True] * len(lines)
    for block in difflib.SequenceMatcher(None, old, lines, autojunk=False).get_matching_blocks():
        new[block.b : block.b + block.size] = [False] * block.size
    return [is_new and bool(line.strip()) for is_new, line in zip(new, lines)]


def files():
    """The eight files side by side: every line a bar, grey where the file that it is read after has the same line."""
    texts = {script: (ROOT / f"{script}.py").read_text().splitlines() for script in READ_AFTER}
    bands = {script: band_of_lines("\n".join(lines)) for script, lines in texts.items()}
    heights = [max(b.count(i) for b in bands.values()) for i in range(len(BANDS))]
    tops = [sum(heights[:i]) + 5 * i for i in range(len(BANDS))]  # a gap of five lines between bands
    figure, axes = plt.subplots(figsize=(12, 7), layout="constrained")
    axes.grid(False)
    for column, (script, earlier) in enumerate(READ_AFTER.items()):
        new, seen = new_lines(script, earlier), Counter()
        for line, band_, is_new in zip(texts[script], bands[script], new):
            y = tops[band_] + seen[band_]
            seen[band_] += 1
            if line.strip():
                indent = len(line) - len(line.lstrip())
                color = BLUE if is_new else "#c4c4c4"
                axes.barh(y, len(line) - indent, 0.8, left=125 * column + indent, color=color, lw=0)
        below = f"{len(new)} lines\n{sum(new)} new"
        axes.text(125 * column, tops[-1] + heights[-1] + 5, below, va="top", fontsize=12)
        axes.text(125 * column, -4, script.replace("_", "_\n", 1), va="bottom", fontsize=12, weight="bold")
    for name, top in zip(BANDS, tops):
        axes.axhline(top - 3, color="black", lw=0.5, alpha=0.3)
        axes.text(-12, top, name, ha="right", va="top", fontsize=12)
    axes.set(xlim=(-10, 1000), ylim=(tops[-1] + heights[-1] + 28, -20))
    axes.axis("off")
    figure.savefig(FIGURES / "files.png", dpi=180)


def thin_and_thick(axes, runs, color, label):
    """Each seed as a thin line, their mean as a thick one."""
    for run in runs:
        axes.plot(run, color=color, lw=1, alpha=0.6)
    axes.plot([sum(c) / len(c) for c in zip(*runs)], color=color, lw=3, label=label)


def real_steps(name, metric):
    """A metric of each step of each real run."""
    runs = [[r for r in run if metric in r and "eval" not in r] for run in logs(REAL, name)]
    return [[r[metric] for r in run] for run in runs]


def before_and_after(axes, names):
    """What the first run of each script wrote for the last test prompt, before training and after it."""
    lines = []
    for name in names:
        before, after = [r["example"] for r in logs(REAL, name)[0] if "example" in r]
        lines += [f"“{before['prompt']}”"] * (not lines)
        for when, sample in (("before", before), (f"after {name.split('_')[-1].upper()}", after)):
            if when != "before" or len(lines) == 1:  # it is the same for all of them
                text = f"{when}: " + " ".join(sample["text"].split())
                shape = {"subsequent_indent": "    ", "break_on_hyphens": False}
                lines += textwrap.wrap(text, 90, max_lines=4, placeholder=" ...", **shape)
    axes.axis("off")
    axes.text(0, 1, "\n".join(lines), va="top", fontsize=12, linespacing=1.35, transform=axes.transAxes)


def real_sums():
    """The sums on real weights: correct answers by step, one prompt before and after."""
    figure, axes = plt.subplot_mosaic("a;c", height_ratios=(4, 1), figsize=(7, 5), layout="constrained")
    for method in ("GRPO", "PPO"):
        runs = real_steps(f"minimal_{method.lower()}", "reward")
        thin_and_thick(axes["a"], runs, METHOD[method], method)
    axes["a"].set(ylabel="rewarded in the batch", xlabel="step", ylim=(0, 1.03))
    axes["a"].legend(frameon=False, loc="lower right")
    before_and_after(axes["c"], ["minimal_grpo"])
    figure.savefig(FIGURES / "real_sums.png")


def real_texts():
    """The texts on real weights: richness and length by step, one prompt before and after."""
    mosaic = {"height_ratios": (3, 3), "figsize": (9, 6.4), "layout": "constrained"}
    figure, axes = plt.subplot_mosaic("ab;cc", **mosaic)
    for place, metric in (("a", "ttr"), ("b", "words")):
        for method in ("REINFORCE", "RLOO"):
            thin_and_thick(axes[place], real_steps(method.lower(), metric), METHOD[method], method)
    axes["a"].set(xlabel="step", ylabel="distinct words / words\nof the first 40", ylim=(0.7, 1))
    axes["a"].legend(frameon=False, loc="lower right")
    axes["b"].set(xlabel="step", ylabel="words")
    axes["b"].axhline(40, color="black", lw=1, ls=":")
    before_and_after(axes["c"], ["reinforce", "rloo"])
    figure.savefig(FIGURES / "real_texts.png")


ASIDE = 0.4  # how many steps a sampled evaluation is drawn beside the greedy one


def real_gsm8k():
    """GSM8K on real weights, GRPO after SFT (two seeds) and alone: accuracy and entropy by step, one test problem."""
    mosaic = {"height_ratios": (4, 1.7, 1.1), "figsize": (16, 8), "layout": "constrained"}
    figure, axes = plt.subplot_mosaic("abc;def;ggg", **mosaic)
    stopped, defaults = logs(REAL, "gsm8k_sft_grpo-16x8")
    (alone,) = logs(REAL, "gsm8k_grpo-16x8")
    alone = [r for r in stopped if r["phase"] == "base"] + alone  # the same untrained model
    for place, below, title, run in (
        ("a", "d", "gsm8k_sft_grpo, seed 1: all 38 steps", defaults),
        ("b", "e", "gsm8k_sft_grpo, seed 0: 34 of 68 steps", stopped),
        ("c", "f", "gsm8k_grpo, seed 0: 20 of 28 steps", alone),
    ):
        gsm8k_accuracy(axes[place], run)
        axes[place].set_title(title)
        steps = [r for r in run if "zero_std" in r]
        x, entropies = [r["step"] for r in steps], [r["entropy"] for r in steps]
        axes[below].plot(x, entropies, color=METHOD["GRPO"], lw=3, label="training batches")
        sampled = [r for r in run if r.get("how") == "sampled"]
        dots = {"ls": "", "marker": "o", "color": "black", "mfc": "white"}
        x, entropies = [r["step"] + ASIDE for r in sampled], [r["entropy"] for r in sampled]
        axes[below].plot(x, entropies, **dots, label="test problems")
        axes[below].set(xlabel="step", ylabel="entropy", ylim=(0, 0.8))
        axes[below].sharex(axes[place])
    axes["c"].legend(frameon=False, loc="lower right", fontsize=12)  # the right run is the shortest
    axes["f"].legend(frameon=False, loc="upper right", fontsize=12)
    untrained, tuned, trained = [r for r in defaults if r.get("how") == "greedy"]
    question = untrained["example"]["prompt"]  # the last test problem, which an evaluation prints
    lines = textwrap.wrap(f"Test problem: {question} (14 is right.)", 190)  # 7 * 8 / 4
    for when, record in (("untrained", untrained), ("after SFT", tuned), ("after GRPO", trained)):
        end = " ".join(record["example"]["text"].split())[-150:]
        lines.append(f"{when}: ... {end.partition(' ')[2]}")
    axes["g"].axis("off")
    style = {"va": "top", "fontsize": 11, "linespacing": 1.35, "parse_math": False}
    text = axes["g"].text(0, 1, "\n".join(lines), transform=axes["g"].transAxes, **style)
    text.set_in_layout(False)
    figure.savefig(FIGURES / "real_gsm8k.png")


def gsm8k_accuracy(axes, run):
    """Training batches and evaluations of one run, the steps of SFT in a band."""
    sft = sum("loss" in r for r in run)
    axes.axvspan(0, sft, color=METHOD["SFT"], alpha=0.15, lw=0)
    axes.text(sft / 2, 0.47, "SFT" * bool(sft), ha="center", color=METHOD["SFT"])
    axes.text(sft + 1, 0.47, "GRPO", color=METHOD["GRPO"])
    steps = [r for r in run if "zero_std" in r]
    x, rewards = [r["step"] for r in steps], [r["reward"] for r in steps]
    axes.plot(x, rewards, color=METHOD["GRPO"], lw=1, alpha=0.6, label="training batches (16 x 8), sampled")
    means = [sum(rewards[i - 4 : i + 1]) / 5 for i in range(4, len(rewards))]
    axes.plot(x[4:], means, color=METHOD["GRPO"], lw=3, label="mean of the last five batches")
    for how, face, aside in (("greedy", "black", 0), ("sampled", "white", ASIDE)):
        records = [r for r in run if r.get("how") == how]
        for record in records:
            p, n = record["eval"]["reward"], record["eval"]["n"]
            label = f"test problems, {how}" if record is records[0] else None
            bar = {"fmt": "o", "capsize": 4, "color": "black", "mfc": face, "label": label}
            half = 1.96 * (p * (1 - p) / n) ** 0.5
            axes.errorbar(record["step"] + aside, p, half, **bar)
            if how == "greedy":  # its number above the bar, the sampled one's to the right
                axes.text(record["step"], p + half + 0.01, f"{p:.2f}", ha="center", va="bottom")
            else:
                axes.text(record["step"] + aside + 1, p, f"{p:.2f}", ha="left", va="center")
    axes.set(ylabel="correct", ylim=(0, 0.52), xlim=(-3, 44))


if __name__ == "__main__":
    files()
    real_sums()
    real_texts()
    real_gsm8k()
    for draw in (methods, styles, lexical, gsm8k) if sys.argv[1:] else ():
        draw(Path(sys.argv[1]))

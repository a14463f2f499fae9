"""What the READMEs say of the code is so: catches a flag that was renamed, a default, a formula or a diff that changed, a result that was
measured on other code than the table tells, a link to nowhere, and a README that grows.
"""

import ast
import importlib
import json
import re
import subprocess

import measure
import pytest
from conftest import PRESENT, ROOT, patched

README = (ROOT / "README.md").read_text()
EVIDENCE = (ROOT / "tests/README.md").read_text()
RESULTS = json.loads((ROOT / "tests/results.json").read_text())
RUN_OF = {"reinforce": "reinforce-mean"}  # the default baseline
NOT_OURS = {"--3way", "--resolution", "--isolated", "--label", "--write", "--nproc-per-node"}


def args_of(script):
    return importlib.import_module(script).Args()


def changed_lines(*command):
    out = subprocess.run(["diff", *command], cwd=ROOT, capture_output=True, text=True).stdout
    return [line for line in out.splitlines() if line[:1] in "<>"]


def evaluations(name, score, which=-1):
    """One number per seed: before (0), after (-1)."""
    return [run[which][score] for run in RESULTS[name]["evaluations"]]


def mean(numbers):
    return sum(numbers) / len(numbers)


def span(numbers, digits=2):
    low, high = (f"{number:.{digits}f}" for number in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def rows(text):
    """Each row of the tables as its cells."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]


def test_it_stays_short():
    words = [word for word in README.split() if re.search(r"\w", word)]  # the bars of a table are none
    assert len(README.splitlines()) <= 260 and len(words) <= 2900


@pytest.mark.parametrize("text", [README, EVIDENCE], ids=["README", "tests/README"])
def test_flags_exist(text):
    known = {f"--{name.replace('_', '-')}" for script in PRESENT for name in vars(args_of(script))}
    named = {flag.rstrip("-") for flag in re.findall(r"--[a-z0-9][a-z0-9_-]*", text)}
    assert named - known - NOT_OURS <= {"--help"}


@pytest.mark.parametrize("folder, text", [(".", README), ("tests", EVIDENCE)], ids=["README", "tests/README"])
def test_links_and_commands_lead_somewhere(folder, text):
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 10
    for target in targets:
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = ROOT / folder / path if path else ROOT / folder / "README.md"
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles], target
    for path in re.findall(r"(?:uv run|python) ([\w/]+\.py)", text):
        assert (ROOT / path).exists() or path == "dr_grpo.py", path


@pytest.mark.parametrize("script", PRESENT)
def test_lines_and_memory(script):
    """Lines and batch as they are; memory as tests/README.md has it, and the smallest card that leaves a tenth free."""
    (cells,) = [cells for cells in rows(README) if cells[0].startswith(f"[{script}.py]") and len(cells) == 7]
    assert int(cells[1]) == len((ROOT / f"{script}.py").read_text().splitlines())
    args = args_of(script)
    sft = f"{args.batch_size}, then " if "sft_steps" in vars(args) else ""
    group = f" x {args.group_size}" if "group_size" in vars(args) else ""
    updates = {1: "", 2: ", twice"}[getattr(args, "update_epochs", 1)]
    assert cells[4] == f"{sft}{args.batch_size}{group}{updates}"
    assert ("reference" in cells[3]) == (getattr(args, "beta", 0) > 0)
    table = EVIDENCE.split("## How large")[1].split("\n## ")[0]
    (counted,) = [row for row in rows(table) if f"`{script}.py`" in row[0]]
    gib = float(counted[-2])
    card = next(size for size in (8, 12, 16, 24) if gib * 1.1 < size * 0.97)
    assert cells[-2:] == [f"{gib} GiB", f"{card} GB"] and counted[-1] == f"{card} GB"


def test_map_of_the_files():
    """After the first file, more than three quarters of the lines are old. All bands are found in all files."""
    figures = pytest.importorskip("figures")
    new = {script: sum(figures.new_lines(script, earlier)) for script, earlier in figures.READ_AFTER.items()}
    lines = {script: sum(map(bool, (ROOT / f"{script}.py").read_text().splitlines())) for script in new}
    del new["minimal_sft"], lines["minimal_sft"]
    assert 0.75 < 1 - sum(new.values()) / sum(lines.values()) < 0.8
    for script in PRESENT:
        bands = figures.band_of_lines((ROOT / f"{script}.py").read_text())
        missing = set(range(len(figures.BANDS))) - set(bands)
        assert missing <= {figures.BANDS.index("algorithm")} and bands[-1] == len(figures.BANDS) - 1


def test_changed_lines():
    listed = [cells for cells in rows(README) if cells[0].startswith("`diff ")]
    assert len(listed) == 6
    for command, number, *_ in listed:
        assert len(changed_lines(*command.strip("`").split()[1:])) == int(number), command


def test_formulas_are_those_of_the_code():
    docstrings = {
        line.strip() for script in PRESENT for line in importlib.import_module(script).__doc__.splitlines()
    }
    methods = README.split("## The methods")[1].split("\n## ")[0]
    formulas = re.findall(r"^    (.+)$", methods, re.MULTILINE)
    assert len(formulas) == 17 and set(formulas) <= docstrings, set(formulas) - docstrings


def test_the_diff_is_the_variants(tmp_path):
    """With the shown lines changed, minimal_grpo.py is dr_grpo.py but for docstrings and flags."""
    (shown,) = re.findall(r"```diff\n(.+?)\n```", README, re.DOTALL)
    before, *changes = (ROOT / "minimal_grpo.py").read_text(), *shown.splitlines()
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert (old[0], new[0], before.count(old[1:])) == ("-", "+", 1)
        before = before.replace(old[1:], new[1:])
    trees = []
    for text in (before, patched("dr_grpo", tmp_path).read_text()):
        trees.append(ast.parse(text))
        trees[-1].body = [node for node in trees[-1].body if getattr(node, "name", "") != "Args"]
        for node in ast.walk(trees[-1]):
            if (
                hasattr(node, "body")
                and isinstance(node, (ast.Module, ast.FunctionDef))
                and ast.get_docstring(node)
            ):
                node.body = node.body[1:]
    assert ast.dump(trees[0]) == ast.dump(trees[1])


def test_the_shown_output(main, capsys):
    """Of a first step: the same lines, the same names in the same order. Numbers may differ between machines."""
    main("minimal_grpo.py --steps 1")
    printed = capsys.readouterr().out.splitlines()
    shown = re.findall(r"^    (.+)$", README.split("Some lines of the output:")[1], re.MULTILINE)[:10]

    def names(line):
        return re.findall(r"[a-z_]+(?= [\d.-]+)", line.split("'")[0])

    assert printed[0] == shown[0]
    assert printed[1] == shown[1]
    assert printed[2].rsplit(" ", 1)[0] == shown[2].rsplit(" ", 1)[0]
    assert printed[3].split(" -> ")[0] == shown[3].split(" -> ")[0]
    assert names(printed[4]) == names(shown[4]) and len(names(shown[4])) == 10
    assert all(names(line) == names(shown[4]) for line in shown if line.startswith("step"))


@pytest.mark.parametrize("script", PRESENT)
def test_results_of_the_eight(script):
    score = "ttr" if script in ("reinforce", "rloo") else "reward"
    name = RUN_OF.get(script, script)
    assert len(RESULTS[name]["evaluations"]) == (3 if script.startswith("gsm8k") else 5)
    before, after = evaluations(name, score, 0), evaluations(name, score)
    wanted = [f"{mean(before):.2f}", f"{mean(after):.2f}", f"{RESULTS['seconds'][script]:.0f}"]
    if span(after) != wanted[1]:
        between = f"; {mean(evaluations(name, score, 1)):.2f} after SFT" if script == "gsm8k_sft_grpo" else ""
        wanted[1] += f" ({span(after)}{between})"
    (cells,) = [cells for cells in rows(README) if cells[0] == f"{script}.py"]
    assert cells[2:5] == wanted
    if script in RESULTS["real"]:
        (run,) = RESULTS["real"][script][:1]
        real = [f"{run['evaluations'][which][score]:.2f}" for which in (0, -1)]
        assert cells[5:] == real


def test_results_of_the_baselines():
    def mean_and_std(numbers, digits):
        mean = sum(numbers) / len(numbers)
        std = (sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)) ** 0.5
        return f"{mean:.{digits}f} ± {std:.{digits}f}"

    for label, name in {
        "none": "reinforce-none",
        "mean": "reinforce-mean",
        "ema": "reinforce-ema",
        "scst": "reinforce-scst",
        "mean, no penalty": "reinforce-gamed",
        "`rloo.py`": "rloo",
    }.items():
        (cells,) = [cells for cells in rows(EVIDENCE) if cells[0] == label and len(cells) == 4]
        wanted = [mean_and_std(evaluations(name, score), 2) for score in ("ttr",)]
        wanted += [mean_and_std(evaluations(name, "words"), 0), f"{sum(RESULTS[name]['grad_norm']) / 5:.0f}"]
        assert cells[1:] == wanted, label


def test_results_in_sentences():
    for script in ("rloo", "reinforce"):
        (run,) = RESULTS["real"][script]
        before, after = run["evaluations"]
        assert (
            f"and are shorter: with each method, from {before['words']:.0f} words to {after['words']:.0f}"
            in README
        )
        assert after["ttr"] > before["ttr"]
    before, after = span(evaluations("yours", "reward", 0)), evaluations("yours", "reward")
    assert f"{before} at first, ends at {', '.join(f'{x:.2f}' for x in after)}" in README


def test_results_on_the_real_gsm8k():
    """Greedy accuracy after each phase of three runs, batches, problems won and lost; answers with code."""
    alone, stopped, whole = (
        [json.loads(line) for line in open(ROOT / f"tests/real/{run}.jsonl")]
        for run in ("gsm8k_grpo-16x8-0", "gsm8k_sft_grpo-16x8-0", "gsm8k_sft_grpo-16x8-1")
    )

    def greedy(run, phase, n):
        *_, last = [r for r in run if r.get("how") == "greedy" and r["phase"] == phase]
        assert last["eval"]["n"] == n
        return last

    def score(record):
        return f"{record['eval']['reward']:.2f}"

    base, sft, after = (greedy(whole, phase, 1319) for phase in ("base", "sft", "grpo"))
    others = [greedy(stopped, phase, 256) for phase in ("base", "sft", "grpo")]
    wanted = {"gsm8k_grpo.py": [score(others[0]), score(greedy(alone, "grpo", 256))]}
    wanted["gsm8k_sft_grpo.py"] = [score(base), f"{score(after)} ({score(sft)} after SFT)"]
    for script, scores in wanted.items():
        assert [cells[-2:] for cells in rows(README) if cells[0] == script] == [scores]
    real = (ROOT / "tests/real/README.md").read_text()
    drawn = {r["phase"]: r for r in whole if r.get("how") == "sampled"}
    for label, record in (("untrained", base), ("after SFT", sft), ("after GRPO", after)):
        assert record["eval"]["reward"] == mean(record["right"])
        numbers = [f"{mean(part):.3f}" for part in (record["right"], record["right"][:256])]
        numbers += [f"{record['tokens']:.0f}", f"{record['finished']:.2f}"]
        at_random = drawn[record["phase"]]
        numbers += [f"{at_random['eval']['reward']:.3f} of {at_random['eval']['n']}"]
        numbers += [f"{at_random['entropy']:.2f}"]
        assert [cells[1:] for cells in rows(real) if cells[0] == label and len(cells) == 7] == [numbers]
    longer = [json.loads(line) for line in open(ROOT / "tests/real/gsm8k_sft_grpo-600-tokens.jsonl")]
    scores = " and ".join(f"{record['eval']['reward']:.3f}" for record in longer)
    assert f"the first 256 problems give {scores}," in real
    for old, new in ((base, after), (sft, after), (base, sft), (drawn["base"], drawn["grpo"]), longer):
        won = sum(b > a for a, b in zip(old["right"], new["right"], strict=True))
        lost = sum(b < a for a, b in zip(old["right"], new["right"], strict=True))
        assert f"{won} won, {lost} lost" in real
    batches = [record["reward"] for record in whole if "zero_std" in record]
    assert len(batches) == 30
    for name, log in (("float32", "sft-0"), ("bfloat16", "16x8-0")):
        records = [json.loads(line) for line in open(ROOT / f"tests/real/gsm8k_sft_grpo-{log}.jsonl")]
        for label, metric, digits in (
            (f"{name}, loss", "loss", 3),
            (f"{name}, gradient norm", "grad_norm", 1),
        ):
            numbers = [f"{record[metric]:.{digits}f}" for record in records if "loss" in record]
            assert [cells[1:] for cells in rows(real) if cells[0] == label] == [numbers] and len(numbers) == 8
    p = after["eval"]["reward"]
    good_to = f"(each ±{1.96 * (p * (1 - p) / 1319) ** 0.5:.3f})"
    gains = [b - a for a, b in zip(base["right"][256:], after["right"][256:])]
    error = (mean([(gain - mean(gains)) ** 2 for gain in gains]) / len(gains)) ** 0.5
    assert f"on the others, the gain is {mean(gains):.3f} ± {1.96 * error:.3f}." in README
    greedily = f"{score(base)} are right untrained, {score(sft)} after SFT, {score(after)} after GRPO"
    sampled = "sampled, {}, {} and {}.".format(*(score(drawn[phase]) for phase in ("base", "sft", "grpo")))
    assert f"{greedily} {good_to}; {sampled}" in README
    assert f"({', '.join(score(other) for other in others)} of 256)" in README
    assert f"({score(others[0])}, {score(greedy(alone, 'grpo', 256))})" in README
    peaks = []  # each run's rates, added up
    for run, planned in ((stopped, 60), (whole, 30)):
        done = len([record for record in run if "zero_std" in record])
        peaks.append(sum(min((step + 1) / 5, 1 - step / planned) for step in range(done)))
    assert (
        "Summed over steps, the rates are {:.1f} (seed 0) and {:.1f} (seed 1) times the peak.".format(*peaks)
        in real
    )
    for few in (5, 10):
        first, last = (f"{mean(part):.2f}" for part in (batches[:few], batches[-few:]))
        assert f"{first} in the first {few}, {last} in the last {few}" in real
    for run in (alone, whole):  # the share of answers with code
        code = [record["code"] for record in run if "code" in record]
        first, last = (f"{mean(part):.2f}" for part in (code[:3], code[-3:]))
        assert f"{first} in the first three steps, {last} in the last three" in real


def test_all_real_runs_of_gsm8k_are_counted():
    """Those of nine or more steps of GRPO: greedy accuracy, first and last, of the runs that have both."""
    changes = {}
    for path in (ROOT / "tests/real").glob("gsm8k*.jsonl"):
        records = [json.loads(line) for line in open(path)]
        if sum("zero_std" in record for record in records) >= 9:
            scores = [r["eval"]["reward"] for r in records if "eval" in r and r.get("how") != "sampled"]
            changes[path.stem] = (scores[0], scores[-1])
    assert len(changes) == 7 and "On GSM8K, one of [seven runs](tests/real/README.md) gained," in README
    assert [run for run, (first, last) in changes.items() if last > first + 0.05] == ["gsm8k_sft_grpo-16x8-1"]
    first, last = changes["gsm8k_grpo-lr1e-5-1"]
    assert f"(one of them {first:.2f} to {last:.2f})" in README


def test_results_of_the_exercises():
    """What is hidden behind each exercise names the accuracy (or ratio and words) of each seed as measured."""
    exercises = README.split("## Exercises")[1].split("\n## ")[0]
    for name in measure.EXERCISES:
        scores = (
            ("ttr",) if "shifted" in name else ("reward", "right") if name == "tags_only" else ("reward",)
        )
        for score in scores:
            listed = ", ".join(f"{x:.2f}" for x in evaluations(f"exercise-{name}", score))
            assert listed in exercises, f"{name}: {score} {listed}"
    runs = [f"reinforce-{baseline}" for baseline in ("none", "mean", "ema", "scst")]
    norms, ratios = (
        [mean(RESULTS[run]["grad_norm"]) for run in runs],
        [mean(evaluations(run, "ttr")) for run in runs],
    )
    assert f"mean norm is {', '.join(f'{x:.0f}' for x in norms)}, the type" in exercises
    assert f"ends at {', '.join(f'{x:.2f}' for x in ratios)} on average" in exercises


def test_results_of_gsm8k():
    for script in ("gsm8k_grpo", "gsm8k_sft_grpo"):
        (cells,) = [cells for cells in rows(EVIDENCE) if cells[0] == f"`{script}.py`" and len(cells) == 4]
        for which, cell in ((0, cells[1]), (-1, cells[3])):
            pairs = zip(evaluations(script, "reward", which), evaluations(script, "lenient", which))
            listed = [f"{a:.3f} / {b:.3f}" for a, b in pairs]
            assert cell == (listed[0] if len(set(listed)) == 1 else ", ".join(listed))


def test_defaults():
    """The flags of tests/README's table, with their defaults in the order of the scripts that it names."""
    for cells in rows(EVIDENCE.split("## The defaults, and why")[1].split("\n## ")[0])[2:]:
        for flag, values in re.findall(r"`(--[a-z-]+)`((?: [\d.e-]+,?)*)", cells[0]):
            name = flag[2:].replace("-", "_")
            defaults = {getattr(args_of(s), name) for s in PRESENT if name in vars(args_of(s))}
            assert not values or {float(v) for v in values.replace(",", "").split()} == defaults, flag


def test_plot_draws_what_log_wrote(monkeypatch, tmp_path):
    """The last phase of two runs, their mean and their evaluations."""
    plot = pytest.importorskip("plot")
    for seed, reward in enumerate((0.2, 0.4)):
        records = [
            {"step": 0, "phase": "base", "eval": {"reward": reward}},
            {"step": 0, "phase": "sft", "loss": 1},
        ]
        records += [{"step": step, "phase": "grpo", "reward": reward + step / 10} for step in range(3)]
        records += [{"step": 3, "phase": "grpo", "eval": {"reward": 1.0}}]
        (tmp_path / f"{seed}.jsonl").write_text("\n".join(map(json.dumps, records)))
    curves, evaluations, metric = plot.read(str(tmp_path / "*.jsonl"), None)
    assert metric == "reward" and evaluations == [[0.2, 1.0], [0.4, 1.0]]
    assert curves == [pytest.approx([0.2, 0.3, 0.4]), pytest.approx([0.4, 0.5, 0.6])]
    monkeypatch.setattr("sys.argv", ["plot.py", str(tmp_path / "out.png"), f"mine={tmp_path}/*.jsonl"])
    plot.main()
    assert (tmp_path / "out.png").stat().st_size > 10_000

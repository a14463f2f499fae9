"""A name means one thing in the whole collection: catches a copy that was forgotten, and a diff that grew.

No file imports another, so nothing but this test keeps the copies equal.
"""

import ast
import difflib
import itertools
import sys

import pytest
from conftest import PRESENT, ROOT

MAY_DIFFER = {
    "parse_args": "each algorithm has flags and defaults of its own",
    "(MODEL, TINY)": "Qwen for answers, Llama for prose",
    "SYSTEM": "the task's own",
}
CHANGED_LINES = {  # by `diff A B`, both sides counted
    ("minimal_grpo", "minimal_ppo"): 70,
    ("minimal_sft", "minimal_dpo"): 50,
    ("reinforce", "rloo"): 40,
    ("minimal_grpo", "rloo"): 80,
    ("gsm8k_grpo", "gsm8k_sft_grpo"): 65,
}
STEPS = ["# 1. sample", "# 2. reward", "# 3. advantages", "# 4. update", "# 5. report"]
LINES = {"gsm8k_grpo": 209, "gsm8k_sft_grpo": 246}  # data, micro-batches, processes, a second phase
SHARED = [  # what stands under `if __name__ == "__main__":` in every file, from one text to another
    ("    args, history = parse_args(), []", "\n"),
    ("    try:  # float32", "raises where there is none"),
    ("    tokenizer.pad_token =", "seed {args.seed}"),
    ("    except KeyboardInterrupt:", "nothing saved: {error}"),
    ("    if args.save:", "    curve, seconds, tokens"),
    ("    peak =", " MiB"),
]
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in PRESENT}
PAIRS = list(itertools.combinations(PRESENT, 2))


def definitions(source):
    """Every top-level function and constant with its text, decorators and comments included, in the file's order."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = lines[first - 1 : node.end_lineno]
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = lines[node.lineno - 1 : node.end_lineno]
    return found


@pytest.mark.parametrize("a, b", PAIRS)
def test_same_name_same_text(a, b):
    first, second = definitions(SOURCES[a]), definitions(SOURCES[b])
    for name in (first.keys() & second.keys()) - MAY_DIFFER.keys():
        assert first[name] == second[name], f"{name} differs between {a}.py and {b}.py"


@pytest.mark.parametrize("a, b", PAIRS)
def test_same_order(a, b):
    first, second = definitions(SOURCES[a]), definitions(SOURCES[b])
    assert [name for name in first if name in second] == [name for name in second if name in first]


@pytest.mark.parametrize("first, last", SHARED)
@pytest.mark.parametrize("a, b", PAIRS)
def test_same_text_under_main(a, b, first, last):
    def part(name):
        start = SOURCES[name].index(first)
        return SOURCES[name][start : SOURCES[name].index(last, start)].replace(f"{name}.py", "")

    assert part(a) == part(b)


@pytest.mark.parametrize("a, b", [pair for pair in CHANGED_LINES if set(pair) <= set(PRESENT)])
def test_changed_lines(a, b):
    delta = difflib.unified_diff(SOURCES[a].splitlines(), SOURCES[b].splitlines(), n=0, lineterm="")
    changed = [line for line in delta if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) <= CHANGED_LINES[a, b], "\n".join(changed)


@pytest.mark.parametrize("name", PRESENT)
def test_stands_alone_and_stays_short(name):
    source = SOURCES[name]
    assert len(source.splitlines()) <= LINES.get(name, 170)
    assert max(map(len, source.splitlines())) <= 110
    imported = {
        alias.name.split(".")[0] if isinstance(node, ast.Import) else node.module.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported <= {"torch", "transformers", "datasets", "dotenv"} | sys.stdlib_module_names
    assert ".generate(" not in source and "__file__" not in source and "trust_remote_code" not in source
    assert source.index("load_dotenv()") < source.index("from transformers")
    present = [step for step in STEPS if step in source]
    assert present == sorted(present, key=source.index) and {"# 4. update", "# 5. report"} <= set(present)
    if name not in ("minimal_sft", "minimal_dpo"):
        assert present == STEPS and "torch.multinomial(" in source

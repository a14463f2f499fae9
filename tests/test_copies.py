"""A name means one thing in the whole collection: catches a copy that was forgotten, and a diff that grew.

No file imports another, so nothing but this test keeps the copies equal.
"""

import ast
import itertools
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import PRESENT, ROOT

MAY_DIFFER = {
    "Args": "each algorithm has flags and defaults of its own",
    "LEAST": "so it has bounds of its own",
    "MODEL": "Qwen for answers, Llama for prose",
    "SYSTEM": "the task's own, as are the next three",
    "TRAIN": "",
    "TEST": "",
    "score": "",
}
CHANGED_LINES = {  # by `diff A B`, both sides counted
    ("minimal_grpo", "minimal_ppo"): 95,
    ("minimal_sft", "minimal_dpo"): 55,
    ("reinforce", "rloo"): 45,
    ("minimal_grpo", "rloo"): 111,
    ("minimal_grpo", "gsm8k_grpo"): 138,
    ("gsm8k_grpo", "gsm8k_sft_grpo"): 52,
}
STEPS = ["# 1. sample", "# 2. reward", "# 3. advantage", "# 4. update", "# 5. report"]
LINES = {"minimal_ppo": 217, "gsm8k_grpo": 247, "gsm8k_sft_grpo": 282}  # not blank; the others 190
SHARED = [  # what stands under `if __name__ == "__main__":` in every file, from one text to another
    ("    parser =", "tokenizer = AutoTokenizer"),
    ('        log = open(args.log, "w"', "exist_ok=True)"),
    ('    if DEVICE == "mps":', "# no mask is made from ids"),
    ("    optimizer = torch.optim.Adam(model.parameters(), args.lr)", ""),
    ('    print(f"model {args.model}', "\n"),
    ("    if args.save:\n        model.save", "tokenizer.save_pretrained(args.save)"),
]
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in PRESENT}
PAIRS = list(itertools.combinations(PRESENT, 2))


def definitions(source):
    """Every top-level function, class and constant with its text, decorators and comments included, in the file's order."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = lines[first - 1 : node.end_lineno]
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = lines[node.lineno - 1 : node.end_lineno]
    return found


def header(name):
    """The PEP 723 block, read as the PEP's own reference code reads it."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (block,) = re.finditer(pattern, SOURCES[name])
    assert block["type"] == "script" and block.start() == 0
    lines = block["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


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
        return SOURCES[name][start : SOURCES[name].index(last, start) + len(last)]

    assert part(a) == part(b)


@pytest.mark.parametrize("a, b", [pair for pair in CHANGED_LINES if set(pair) <= set(PRESENT)])
def test_changed_lines(a, b):
    delta = subprocess.run(["diff", f"{a}.py", f"{b}.py"], cwd=ROOT, capture_output=True, text=True).stdout
    changed = [line for line in delta.splitlines() if line[0] in "<>"]
    assert 20 < len(changed) <= CHANGED_LINES[a, b], delta


@pytest.mark.parametrize("name", PRESENT)
def test_the_header_asks_for_what_the_project_asks_for(name):
    """A file that is run alone gets the versions that the tests run with, of the packages that it imports and no others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert header(name)["requires-python"] == project["requires-python"]
    needed = [d for d in project["dependencies"] if not d.startswith("datasets") or name.startswith("gsm8k")]
    assert header(name)["dependencies"] == needed


@pytest.mark.parametrize("name", PRESENT)
def test_stands_alone_and_stays_short(name):
    source = SOURCES[name]
    assert sum(bool(line.strip()) for line in source.splitlines()) <= LINES.get(name, 190)
    assert max(map(len, source.splitlines())) <= 110
    imported = {
        alias.name.split(".")[0] if isinstance(node, ast.Import) else node.module.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported <= {"torch", "transformers", "datasets", "dotenv"} | sys.stdlib_module_names
    assert ".generate(" not in source and "trust_remote_code" not in source
    assert "__file__" not in source.replace('"__file__" in globals()', "")
    assert source.index("load_dotenv()") < source.index("from transformers")
    assert "except RuntimeError" not in source and "except Exception" not in source
    present = [step for step in STEPS if step in source]
    assert present == sorted(present, key=source.index) and {"# 4. update", "# 5. report"} <= set(present)
    if name not in ("minimal_sft", "minimal_dpo"):
        assert present == STEPS and "torch.multinomial(" in source

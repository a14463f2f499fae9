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
    "MODEL": "Qwen for answers, Llama for prose",
    "SYSTEM": "the task's own, as are the next three",
    "TRAIN": "",
    "TEST": "",
    "score": "",
}
CHANGED_LINES = {  # by `diff A B`, both sides counted
    ("minimal_grpo", "minimal_ppo"): 104,
    ("minimal_sft", "minimal_dpo"): 45,
    ("reinforce", "rloo"): 43,
    ("minimal_grpo", "rloo"): 109,
    ("minimal_grpo", "gsm8k_grpo"): 91,
    ("gsm8k_grpo", "gsm8k_sft_grpo"): 56,
}
LINES_OF_CODE = {
    "minimal_sft": 134,
    "minimal_dpo": 145,
    "minimal_grpo": 171,
    "minimal_ppo": 195,
    "reinforce": 159,
    "rloo": 153,
    "gsm8k_grpo": 209,
    "gsm8k_sft_grpo": 239,
}
STEPS = ["# 1. sample", "# 2. reward", "# 3. advantage", "# 4. update", "# 5. report"]
SHARED = [  # what stands under `if __name__ == "__main__":` in every file, from one text to another
    ("    parser =", "# [] in a notebook"),
    ('    print(f"--model', "tokenizer.pad_token or end_of_turn(tokenizer)"),
    ("    if args.save:  # now", "training prompts"),
    ("    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)", ""),
    ("    finally:", "model.save_pretrained(args.save)"),
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
def test_same_text_under_main(first, last):
    parts = {}
    for name, source in SOURCES.items():
        start = source.index(first)
        parts.setdefault(source[start : source.index(last, start) + len(last)], []).append(name)
    assert len(parts) == 1, parts


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


def lines_of_code(source):
    """Not blank, no comment, no docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, documented) and ast.get_docstring(n)]
    strings = {i for n in nodes for i in range(n.body[0].lineno, n.body[0].end_lineno + 1)}
    lines = [line.strip() for i, line in enumerate(source.splitlines(), 1) if i not in strings]
    return sum(bool(line) and not line.startswith("#") for line in lines)


@pytest.mark.parametrize("name", PRESENT)
def test_stays_short(name):
    assert lines_of_code(SOURCES[name]) <= LINES_OF_CODE[name]
    assert max(map(len, SOURCES[name].splitlines())) <= 110


@pytest.mark.parametrize("name", PRESENT)
def test_nothing_is_left_over(name):
    """Each top-level name is used, somewhere outside its own definition."""
    body = ast.parse(SOURCES[name]).body
    used = [
        {n.id for n in ast.walk(part) if isinstance(n, ast.Name) and type(n.ctx) is ast.Load} for part in body
    ]
    for defined in definitions(SOURCES[name]):
        own = [getattr(part, "name", None) == defined for part in body]
        assert any(defined in names for names, mine in zip(used, own) if not mine), defined


@pytest.mark.parametrize("name", PRESENT)
def test_stands_alone(name):
    source = SOURCES[name]
    nodes = list(ast.walk(ast.parse(source)))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    packages = {module.split(".")[0] for module in modules}
    assert packages <= {"torch", "transformers", "datasets", "dotenv"} | sys.stdlib_module_names
    assert source.index("load_dotenv()") < source.index("from transformers")
    assert not any(isinstance(node, ast.ExceptHandler) for node in nodes) and "sys.exit" not in source
    assert "__file__" not in source.replace('"__file__" in globals()', "")
    # the last one is called cache from transformers 5.24 on, and the old name no longer works from 5.40 on
    for unwanted in (".generate(", "trust_remote_code", "past_key_values"):
        assert unwanted not in source
    present = [step for step in STEPS if step in source]
    assert present == sorted(present, key=source.index) and {"# 4. update", "# 5. report"} <= set(present)
    if name not in ("minimal_sft", "minimal_dpo"):
        assert present == STEPS and "torch.multinomial(" in source

"""Each script's whole text in one cell of a fresh Jupyter kernel, on its defaults, learns: catches whatever the unit tests do not,
__file__, an argparse that reads the kernel's own flags, and a function that hides what a notebook wants to see afterwards. And
`%run FILE --steps 3`, whose flags must not be ignored.
"""

import json
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import PRESENT, ROOT

# script: what its first evaluation may show at most, what its last one must show at least
REWARD = {
    "minimal_sft": (0.45, 0.95),
    "minimal_dpo": (0.45, 0.95),
    "minimal_grpo": (0.45, 0.95),
    "minimal_ppo": (0.45, 0.90),
    "gsm8k_grpo": (0.50, 0.56),
    "gsm8k_sft_grpo": (0.50, 0.61),
}
AFTERWARDS = """
import json
print(json.dumps([type(model).__name__, type(tokenizer).__name__, len(history), sorted(history[-1])]))
"""


# In a process of its own, so that no import of this one is there already.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=400).execute()
nbformat.write(notebook, sys.argv[1])
"""


def in_a_notebook(source, path):
    """What the cell prints, and what is there afterwards."""
    cells = [nbformat.v4.new_code_cell(x) for x in (source, AFTERWARDS)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    subprocess.run([sys.executable, "-c", EXECUTE, path], cwd=ROOT, check=True)
    cells = nbformat.read(path, 4).cells
    return ["".join(o["text"] for o in c.outputs if o.get("name") == "stdout") for c in cells]


# One seed each here, for time; what the README claims of the others was run by hand.
@pytest.mark.parametrize("script", PRESENT)
def test_it_learns_in_a_notebook(script, tmp_path):
    source = (ROOT / f"{script}.py").read_text()
    out, afterwards = in_a_notebook(source, tmp_path / "notebook.ipynb")
    assert re.search(r'^\["(Qwen2|Llama)ForCausalLM", "\w+", 30, \[', afterwards)
    steps = len(re.findall(r"^step \d+  ", out, re.MULTILINE))
    assert steps == (33 if script == "gsm8k_sft_grpo" else 30) and "model tests/tiny-" in out
    evaluations = re.findall(r"greedy.*: reward (\S+)(?:  ttr (\S+)  words (\S+))?", out)
    if script in REWARD:
        rewards = [float(reward) for reward, *_ in evaluations]
        highest, lowest = REWARD[script]
        assert rewards[0] <= highest and rewards[-1] >= max(lowest, rewards[0] + 0.25)
        if script == "gsm8k_sft_grpo":
            base, sft, grpo = rewards
            assert base < sft < grpo and grpo >= base + 0.30
    else:
        (_, ratio, words), (_, ratio_after, words_after) = evaluations
        assert 0.45 <= float(ratio) <= 0.65 and float(ratio_after) >= float(ratio) + 0.15
        assert float(words_after) >= 0.85 * 40


@pytest.mark.parametrize("script", ["minimal_grpo", "gsm8k_sft_grpo"])
def test_run_magic_takes_the_flags(script, tmp_path):
    more = " --eval-size 2 --sft-steps 1" if script.startswith("gsm8k") else ""
    cell = f"%run {script}.py --steps 3 --batch-size 2{more}"
    out, afterwards = in_a_notebook(cell, tmp_path / "notebook.ipynb")
    assert json.loads(afterwards)[2] == 3 and "\nstep 2  " in out and "\nstep 3  " not in out

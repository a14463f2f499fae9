"""Each script's whole text in one cell of a Jupyter kernel, on its defaults but for the micro-batch, learns: catches whatever the unit tests do not,
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

# script: the reward before training is at most the one, after it at least the other
REWARD = {
    "minimal_sft": (0.45, 0.95),
    "minimal_dpo": (0.45, 0.80),  # it leaves a few percent in the forms that it rejects
    "minimal_grpo": (0.45, 0.90),  # five seeds: 0.95 to 0.98, of 100 samples
    "minimal_ppo": (0.45, 0.90),
}
GAIN = {"gsm8k_grpo": 0.25, "gsm8k_sft_grpo": 0.30}
AFTERWARDS = """
import json
print(json.dumps([type(model).__name__, type(tokenizer).__name__, len(history), sorted(history[-1])]))
"""
# Two kernels for all of it, since one takes as long to start as a script to run: before each file all names are deleted.
FORGET = "%reset -f"
NOTEBOOKS = [PRESENT[:4], PRESENT[4:]]
MAGIC = {"minimal_ppo": "", "gsm8k_sft_grpo": " --eval-size 2 --sft-steps 1"}

# In a process of its own, so that no import of this one is there already.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=400).execute()
nbformat.write(notebook, sys.argv[1])
"""


def in_large_parts(source):
    """With --micro-batch-size 64, for time; test_micro_batches.py has it that this changes nothing else."""
    return re.sub(r"(micro_batch_size: int = HfArg\(default=)\d+", r"\g<1>64", source)


def in_a_notebook(sources, path):
    """What each cell prints."""
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(x) for x in sources]), path)
    subprocess.run([sys.executable, "-c", EXECUTE, path], cwd=ROOT, check=True)
    cells = nbformat.read(path, 4).cells
    return ["".join(o["text"] for o in c.outputs if o.get("name") == "stdout") for c in cells]


# One seed each here, for time; tests/measure.py runs the others.
@pytest.mark.parametrize("scripts", NOTEBOOKS, ids=lambda scripts: scripts[0])
def test_they_learn_in_a_notebook(scripts, tmp_path):
    """Each file as it is, then the last one once more by %run, with flags."""
    sources = []
    for script in scripts:
        sources += [FORGET, in_large_parts((ROOT / f"{script}.py").read_text()), AFTERWARDS]
    flags = f"--steps 3 --batch-size 2{MAGIC[scripts[-1]]}"
    sources += [FORGET, f"%run {scripts[-1]}.py {flags}", AFTERWARDS]
    printed = in_a_notebook(sources, tmp_path / "notebook.ipynb")
    for script, out, afterwards in zip(scripts, printed[1::3], printed[2::3]):
        learned(script, out, afterwards)
    *_, out, afterwards = printed
    last = 3 if scripts[-1] == "gsm8k_sft_grpo" else 2  # it goes on counting after its step of SFT
    assert json.loads(afterwards)[2] == last + 1
    assert f"\nstep {last}  " in out and f"\nstep {last + 1}  " not in out


def learned(script, out, afterwards):
    steps = len(re.findall(r"^step \d+  ", out, re.MULTILINE))
    assert steps == (38 if script == "gsm8k_sft_grpo" else 30) and out.startswith("--model tests/tiny-"), (
        script
    )
    assert re.search(rf'^\["(Qwen2|Llama)ForCausalLM", "\w+", {steps}, \[', afterwards), script
    means = [dict(re.findall(r"(\w+) ([\d.]+)", line)) for line in re.findall("(?:sampled|greedy)(.*)", out)]
    before, *_, after = [{name: float(mean) for name, mean in line.items()} for line in means]
    if script in GAIN:
        assert after["reward"] >= before["reward"] + GAIN[script], script
    elif script in REWARD:
        highest, lowest = REWARD[script]
        assert before["reward"] <= highest and after["reward"] >= lowest, script
    else:
        assert after["ttr"] >= before["ttr"] + 0.15 and after["words"] >= 0.85 * before["words"], script

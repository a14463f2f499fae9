"""Set before anything is imported: no network, one thread a process (two processes of two threads on two cores crawl)."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = "minimal_sft minimal_dpo minimal_grpo minimal_ppo reinforce rloo gsm8k_grpo gsm8k_sft_grpo".split()
PRESENT = [name for name in SCRIPTS if (ROOT / f"{name}.py").exists()]


def base_of(diff):
    """The file that a diff changes, by its own first line."""
    (line,) = [line for line in diff.read_text().splitlines() if line.startswith("--- a/")]
    return line.removeprefix("--- a/")


def patched(name, folder):
    """A copy of the base with the diff applied."""
    diff = ROOT / f"tests/variants/{name}.diff"
    path = folder / f"{name}.py"
    path.write_text((ROOT / base_of(diff)).read_text())
    subprocess.run(["patch", "--silent", path, diff], check=True)
    return path


@pytest.fixture(scope="session")
def variant(tmp_path_factory):
    """variant("gspo"): the patched script as a module."""
    folder = tmp_path_factory.mktemp("variants")

    def variant(name):
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, patched(name, folder))
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    return variant


@pytest.fixture(scope="session")
def tiny():
    """tiny("qwen"), tiny("llama"): a fresh model in float32 and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def tiny(name):
        folder = ROOT / f"tests/tiny-{name}"
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer

    return tiny


@pytest.fixture
def updates(monkeypatch):
    """What each optimizer step applies: the gradient after clipping, flat, in the order of the steps (PPO: policy, critic)."""
    import torch

    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def watched(parameters, *args, **kwargs):
        parameters = list(parameters)
        norm = clip(parameters, *args, **kwargs)
        seen.append(torch.cat([p.grad.flatten() for p in parameters]))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    return seen


@pytest.fixture
def run(tmp_path):
    """run("minimal_grpo", "--steps", 2): the script as a process, in the checkout; has .returncode, .stdout, .stderr, .log."""

    def run(script, *flags, **environment):
        log = tmp_path / "log.jsonl"
        command = [sys.executable, f"{script}.py", "--log", log, *flags]
        done = subprocess.run(
            [*map(str, command)], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
        )
        done.log = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return done

    return run


@pytest.fixture
def main(monkeypatch):
    """main("minimal_grpo.py --steps 2"): the globals that the script leaves behind."""

    def main(command):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", command.split())
        return runpy.run_path(sys.argv[0], run_name="__main__")

    return main

"""Each script, run as a newcomer runs it, learns: catches whatever the unit tests do not. The log is the evidence.

minimal_ppo.py learns in tests/test_ppo.py, where its critic is looked at too.
"""

import pytest
from conftest import PRESENT

# script: (highest accuracy before, lowest after), greedy on all 100 sums
SUMS = {
    "minimal_sft": (0.45, 0.95),
    "minimal_dpo": (0.45, 0.95),
    "minimal_grpo": (0.45, 0.95),
}

LEXICAL = ["reinforce", "rloo"]


# One seed each here, for time; what the README claims of seeds 0 to 4 was run by hand.
@pytest.mark.parametrize("script", [script for script in SUMS if script in PRESENT])
def test_sums(run, script, seed=0):
    done = run(script, "--seed", seed)
    assert done.returncode == 0, done.stderr
    before, *steps, after = done.log
    assert (before["step"], after["step"]) == (0, 30) and [record["step"] for record in steps] == list(
        range(30)
    )
    assert before["eval"]["accuracy"] <= SUMS[script][0]
    assert after["eval"]["accuracy"] >= SUMS[script][1]


@pytest.mark.parametrize("script", [script for script in LEXICAL if script in PRESENT])
def test_lexical(run, script, seed=0):
    done = run(script, "--seed", seed)
    assert done.returncode == 0, done.stderr
    before, after = done.log[0]["eval"], done.log[-1]["eval"]
    assert 0.45 <= before["ttr"] <= 0.65 and after["ttr"] >= before["ttr"] + 0.15
    assert after["words"] >= 0.85 * 40

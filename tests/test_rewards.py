"""The sums' score on what a model might say instead of the answer: catches a reward that can be had without it."""

import pytest
from minimal_grpo import score


@pytest.mark.parametrize(
    "completion, right",
    [
        ("<answer>11</answer>", True),
        ("3 + 8 is 11, so <answer>11</answer>", True),
        ("<answer>11</answer>.", True),
        ("", False),
        ("11", False),
        ("The answer is 11.", False),
        ("<answer></answer>", False),
        ("<answer>1</answer>", False),
        ("<answer>111</answer>", False),
        ("<answer>-11</answer>", False),
        ("<answer>11.0</answer>", False),
        ("<answer>3 + 8 = 11</answer>", False),
        ("<answer>12 or 11</answer>", False),
        ("<answer>11</answer><answer>12</answer>", False),
        ("<answer>12</answer><answer>11</answer>", False),
        ("<answer>11</answer><answer>11</answer>", False),
        ("<answer><answer>11</answer></answer>", False),
        ("<answer>11</answer></answer>", False),
        ("<answer>11</answer> <answer>", False),
        ("<answer>11", False),
        ("11</answer>", False),
        ("</answer>11<answer>", False),
        ("<answer>11<answer>", False),
        ("<Answer>11</Answer>", False),
        ("<answer>eleven</answer>", False),
        ("<answer>１１</answer>", False),
        ("What is 3 + 8? <answer>result</answer>", False),
        ("".join(f"<answer>{n}</answer>" for n in range(19)), False),
    ],
)
def test_score_of_a_sum(completion, right):
    assert score(completion, 11) == {"reward": float(right)}

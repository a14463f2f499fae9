"""The variants with tasks of their own: catches an answer that is judged wrongly, a test problem that was trained on, and a scorer that
is not the task's.

reasoning-gym itself is not installed for the tests. What stands in for it has the three things that the variant uses, called as in
reasoning-gym 0.1.25: create_dataset, get_score_answer_fn, and entries with question, answer and metadata["source_dataset"].
"""

import sys
import types

import pytest
from conftest import patched


@pytest.mark.parametrize(
    "text, answer, reward, exact",
    [
        ("s t r a w b e r r y <answer>3</answer>", 3, 1, 1),
        ("<answer> 3\n</answer>", 3, 1, 1),
        ("<answer>2</answer>", 3, 2 / 3, 0),
        ("<answer>4</answer>", 3, 2 / 3, 0),
        ("<answer>6</answer>", 3, 0, 0),
        ("<answer>100</answer>", 3, 0, 0),
        ("<answer>0</answer>", 0, 1, 1),
        ("<answer>1</answer>", 0, 0, 0),
        ("<answer>-3</answer>", 3, 0, 0),
        ("<answer>three</answer>", 3, 0, 0),
        ("<answer>3</answer><answer>2</answer>", 3, 0, 0),
        ("<answer>no</answer><answer>3</answer>", 3, 0, 0),
        ("3", 3, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_counts_are_judged_by_hand(variant, text, answer, reward, exact):
    assert variant("letter_counting").score(text, answer) == {"reward": pytest.approx(reward), "exact": exact}


def test_letters_are_counted_and_words_held_out(variant):
    task = variant("letter_counting")
    asked = dict(task.TRAIN + task.TEST)
    assert asked["How many times does the letter r occur in strawberry?"] == 3
    assert asked["How many times does the letter i occur in mississippi?"] == 4
    assert asked["How many times does the letter e occur in banana?"] == 0
    words = [{prompt.split()[-1] for prompt, _ in part} for part in (task.TRAIN, task.TEST)]
    assert not words[0] & words[1] and len(words[0]) > len(words[1]) > 4


def test_the_letter_alone_does_not_tell(variant):
    """The best answer to each letter in TRAIN, or one answer to all, earns less than half on the held-out words."""
    task = variant("letter_counting")

    def reward(given, answer):
        return max(0, 1 - abs(given - answer) / max(1, answer))

    def letter(prompt):
        return prompt.split()[6]

    def best(answers):
        return max(range(5), key=lambda given: sum(reward(given, answer) for answer in answers))

    everything = best([answer for _, answer in task.TRAIN])
    for by_letter in (False, True):
        given = []
        for prompt, _ in task.TEST:
            same = [answer for p, answer in task.TRAIN if letter(p) == letter(prompt)]
            given.append(best(same) if by_letter and same else everything)
        earned = [reward(g, answer) for g, (_, answer) in zip(given, task.TEST)]
        assert 0.3 < sum(earned) / len(earned) < 0.5


def fake_score(answer, entry):
    """1 if right, 0.5 if only the first character is, 0 if there is none."""
    if answer is None:
        return 0
    return 1 if answer == entry["answer"] else 0.5 * (answer[:1] == entry["answer"][:1])


def fake_dataset(name, size, seed):
    if name != "numbers":
        raise ValueError(f"Dataset '{name}' not registered")
    """As in Reasoning Gym, problem i of a seed is problem 0 of the seed plus i."""
    return [
        {"question": f"{seed + i}?", "answer": f"{seed + i}0", "metadata": {"source_dataset": name}}
        for i in range(size)
    ]


@pytest.fixture
def gym(monkeypatch):
    scorers = {"numbers": fake_score}
    fake = types.SimpleNamespace(create_dataset=fake_dataset, get_score_answer_fn=scorers.__getitem__)
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)


def test_the_tasks_own_scorer(gym, variant):
    task = variant("reasoning_gym_grpo")
    ((prompt, answer),) = task.load_task("numbers", 1, 7)
    assert prompt == "7?"
    judged = {
        "<answer>70</answer>": 1,
        "<answer>1</answer> no, <answer>\n70\n</answer>": 1,
        "<answer>71</answer>": 0.5,
        "<answer></answer>": 0,
        "70": 0,
        "<answer>70": 0,
    }
    assert {text: task.score(text, answer)["reward"] for text in judged} == judged


def test_it_runs(gym, main, tmp_path):
    flags = "--task numbers --steps 1 --batch-size 2 --group-size 2 --max-new-tokens 4 --seed 3"
    g = main(f"{patched('reasoning_gym_grpo', tmp_path)} {flags}")
    train, test = ({int(prompt.rstrip("?")) for prompt, _ in g[part]} for part in ("TRAIN", "TEST"))
    assert train == set(range(3000, 4000)), "no problem of another --seed"
    assert not train & test
    assert len(g["TRAIN"]) == 1000 and len(g["TEST"]) == 100
    with pytest.raises(ValueError, match="nope"):
        main(f"{tmp_path / 'reasoning_gym_grpo.py'} --task nope")

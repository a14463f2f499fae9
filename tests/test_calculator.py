"""The calculator variant: catches an expression that runs code or hangs, a result in the wrong row or place, and a tool token in the loss."""

import itertools
import json
import time

import pytest
import torch
from conftest import patched

import gsm8k_sft_grpo

SOLUTIONS = [  # calls at different places, two in one, none, one that fails, and one of the longest
    "There are 2*4=<<2*4=8>>8 eggs.\nThe answer is \\boxed{8}.",
    "Ann has 12+5=<<12+5=17>>17 nuts.\nTogether they have 12+17=<<12+17=29>>29 nuts.\nThe answer is \\boxed{29}.",
    "The answer is \\boxed{3}.",
    "<<nuts=error>>The answer is 1.",
    "<<" + "1+" * 49 + "1=50>>",
]
PROMPTS = ["How many eggs?", "Ann has 5 more than Amy. How many nuts?", "Hi", "?", "How many ones?"]


@pytest.mark.parametrize(
    "expression, value",
    [
        ("48/2", "24"),
        (" 3 + 4 ", "7"),
        ("48/2*(1+3)", "96"),
        ("2-3-4", "-5"),
        ("-5+3", "-2"),
        ("-(2-5)", "3"),
        (".5*4.", "2"),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.3333"),
        ("123456789*1000", "123456789000"),
        ("1+" * 49 + "1", "50"),
        ("1+" * 50 + "1", "error"),  # 101 characters
        *[
            (bad, "error")
            for bad in (
                "9**9**9",
                "9//2",
                "1/0",
                "1/(2-2)",
                "__import__('os').abort()",
                "exit()",
                "3(4)",
                "(1)(2)",
                "()",
                "...",
                "1,000*2",
                "1e5",
                "0x10",
                "1_0",
                "007",
                "٣+٤",
                "2*",
                "(" * 50,
                "(" * 10_000,
                "9" * 10_000,
                "1+" * 10_000 + "1",
                "",
                " ",
                "1\n+1",
            )
        ],
    ],
    ids=lambda value: value[:20],
)
def test_calculate(variant, expression, value):
    calculate = variant("calculator").calculate
    start = time.perf_counter()
    assert calculate(expression) == value
    assert time.perf_counter() - start < 0.1


def test_marks_are_counted_and_not_read(variant):
    score = variant("calculator").score
    right = {"reward": 1, "lenient": 1, "failed_calls": 0}
    assert score(SOLUTIONS[0], "\\boxed{8}") == right | {"calls": 1}
    assert score(SOLUTIONS[1], "<<1+1=2>>\\boxed{29}") == right | {"calls": 2}
    assert score("\\boxed{<<1+1=2>>2}", "2") == right | {"calls": 1}
    assert score("\\boxed{2} <<1/0=error>>", "2") == right | {"calls": 1, "failed_calls": 1}
    assert score("The answer is <<1+1=2>>", "2")["lenient"] == 0
    assert score("The answer is 2 <<1\n+1=error>>", "2")["lenient"] == 1
    assert score("The answer is 2 <<3", "2")["lenient"] == 0


def imitated(variant, tiny):
    """The solutions as SFT has them: module, model (in float64), tokenizer, ids, attn, mask."""
    module, (model, tokenizer) = variant("calculator"), tiny("qwen")
    return module, model.double(), tokenizer, *module.encode_completions(tokenizer, PROMPTS, SOLUTIONS)


def test_sft_does_not_train_results(variant, tiny):
    _, _, tokenizer, ids, attn, mask = imitated(variant, tiny)
    completions, attended = ids[:, -mask.shape[1] :], attn[:, -mask.shape[1] :]
    for solution, row, there, own in zip(SOLUTIONS, completions, attended, mask):
        assert tokenizer.decode(row[there.bool()]) == solution + tokenizer.eos_token
        assert not (own > there).any()
        tools = tokenizer.decode(row[there.bool() & ~own.bool()])
        assert tools == {0: "8>>", 1: "17>>29>>", 2: "", 3: "error>>", 4: "50>>"}[SOLUTIONS.index(solution)]


def replay(monkeypatch, module, model, tokenizer, prompts, own):
    """Samples with given draws, each row's own tokens in turn: what sample returns, and the log-probs drawn, (N, C)."""
    own, drawn = [list(row) for row in own], []

    def scripted(probs, count):
        step = len(drawn)
        sampled = torch.tensor([[row[step] if step < len(row) else 0] for row in own])
        drawn.append(probs.gather(1, sampled).log())
        return sampled

    monkeypatch.setattr(torch, "multinomial", scripted)
    return *module.sample(model, tokenizer, prompts, 200), torch.cat(drawn, 1)


def test_sampled_as_imitated(monkeypatch, variant, tiny):
    """Drawing a solution's own tokens, with any token where the calculator writes, gives the layout of SFT; its log-probs are scored ones."""
    module, model, tokenizer, ids, attn, mask = imitated(variant, tiny)
    C = mask.shape[1]
    other = ids[:, -C:] * mask.long() + (1 - mask.long()) * 7  # a draw that must not be used
    texts, *sampled, finished, drawn = replay(monkeypatch, module, model, tokenizer, PROMPTS, other.tolist())
    assert texts == SOLUTIONS and finished.all()
    for got, wanted in zip(sampled, (ids, attn, mask), strict=True):
        end = attn if got.shape == attn.shape else attn[:, -C:]
        assert torch.equal(got * end, wanted * end)
    scored = module.completion_logp(model, *sampled)
    assert ((scored - drawn) * mask).abs().max() < 1e-5
    assert (scored * (1 - mask) == 0).all() and (scored * mask).min() < -1


def test_rows_do_not_disturb_each_other(monkeypatch, variant, tiny):
    """A row with its calls comes out of the batch as it does alone."""
    module, model, tokenizer, ids, attn, mask = imitated(variant, tiny)
    C = mask.shape[1]
    scripts = ids[:, -C:].tolist()
    texts, _, attn, mask, _, drawn = replay(monkeypatch, module, model, tokenizer, PROMPTS, scripts)
    for i, prompt in enumerate(PROMPTS):
        alone = replay(monkeypatch, module, model, tokenizer, [prompt], scripts[i : i + 1])
        n = alone[3].shape[1]
        assert alone[0] == [texts[i]]
        assert (
            torch.equal(alone[3][0], mask[i, :n]) and not mask[i, n:].any() and not attn[:, -C:][i, n:].any()
        )
        assert ((alone[5] - drawn[i, :n]) * alone[3]).abs().max() < 1e-5


def test_a_call_at_the_limit(monkeypatch, variant, tiny):
    """Cut off within a result, a row is unfinished, and no token is written past the limit."""
    module, model, tokenizer, ids, _, mask = imitated(variant, tiny)
    start = mask[1].tolist().index(0)
    monkeypatch.setattr(
        torch, "multinomial", lambda probs, n: ids[1:2, -mask.shape[1] :][:, next(steps)][:, None]
    )
    steps = iter(range(100))
    texts, _, _, mask, finished = module.sample(model, tokenizer, PROMPTS[1:2], start + 1)
    assert texts == ["Ann has 12+5=<<12+5=1"] and mask[0].tolist() == [1] * start + [0] and not finished


QUESTION = "There are 2 boxes with 4 eggs in each and 3 more. How many eggs are there?"
RIGHT = [  # every second piece is the calculator's
    "There are 2*4=<<2*4=",
    "8>>",
    "8 eggs in the boxes.\nThere are 8+3=<<8+3=",
    "11>>",
    "11 eggs.\nThe answer is \\boxed{11}.<|im_end|>",
]
WRONG = ["There are <<nuts=", "error>>", "9 eggs.\nThe answer is \\boxed{9}.<|im_end|>"]


def own_logps(tiny, pieces_of_rows):
    """A fresh model and, for each completion, the log-probs of its own tokens; each row alone, so without padding and mask."""
    (model, tokenizer), logps = tiny("qwen"), []
    model = model.double()
    chat = [{"role": "system", "content": gsm8k_sft_grpo.SYSTEM}, {"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    for pieces in pieces_of_rows:
        tokens = [tokenizer(piece)["input_ids"] for piece in pieces]
        ids = torch.tensor([prompt + sum(tokens, [])])
        own = [i % 2 == 0 for i, piece in enumerate(tokens) for _ in piece]
        logp = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logps.append(logp[range(len(own)), ids[0, len(prompt) :]][torch.tensor(own)])
    return model, logps


def grad_norm(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm().item()


@pytest.fixture
def calculator(main, tmp_path):
    """calculator(flags): a run on a data set of one problem; the records of its steps."""
    row = {"question": QUESTION, "answer": "".join(RIGHT).split("The answer")[0] + "#### 11"}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    path, log = patched("calculator", tmp_path), tmp_path / "log"

    def calculator(flags):
        main(f"{path} --dataset {tmp_path} --micro-batch-size 1 --eval-size 1 --log {log} {flags}")
        records = [json.loads(line) for line in log.read_text().splitlines()]
        return [record for record in records if "grad_norm" in record]

    return calculator


def test_the_loss_of_sft_is_that_of_the_own_tokens(tiny, calculator):
    (record,) = calculator("--sft-steps 1 --steps 0 --batch-size 1")
    model, (logp,) = own_logps(tiny, [RIGHT])
    assert record["loss"] == pytest.approx(-logp.mean().item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(grad_norm(model, -logp.mean()), rel=1e-4)


def imitate(monkeypatch, tokenizer, rows):
    """The draws of the next batch are the tokens of the given completions."""
    scripts = [[t for piece in row for t in tokenizer(piece)["input_ids"]] for row in rows]
    steps = itertools.count()

    def scripted(probs, count):
        step = next(steps)
        return torch.tensor([[script[step] if step < len(script) else 0] for script in scripts])

    monkeypatch.setattr(torch, "multinomial", scripted)


def test_the_loss_of_grpo_is_that_of_the_own_tokens(monkeypatch, tiny, calculator):
    """A right and a wrong completion: advantages of plus and minus 1 / sqrt(2), for the standard deviation is that of a sample."""
    (model, logps), (_, tokenizer) = own_logps(tiny, [RIGHT, WRONG]), tiny("qwen")
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    loss = -advantage * (logps[0].sum() - logps[1].sum()) / sum(map(len, logps))
    imitate(monkeypatch, tokenizer, [RIGHT, WRONG])
    flags = "--sft-steps 0 --steps 1 --batch-size 1 --group-size 2 --update-epochs 1 --beta 0"
    (record,) = calculator(flags)
    assert record["reward"] == 0.5 and record["finished"] == 1
    assert record["calls"] == 1.5 and record["failed_calls"] == 0.5
    assert record["tokens"] == sum(map(len, logps)) / 2
    assert record["grad_norm"] == pytest.approx(grad_norm(model, loss), rel=1e-4)


def test_results_do_not_depend_on_micro_batches(monkeypatch, updates, tiny, calculator):
    """Every gradient, loss and metric of SFT and GRPO, as in tests/test_micro_batches.py: rows with two calls, one and none."""
    rows = [RIGHT, WRONG, [*RIGHT[:2], "<|im_end|>"], WRONG[2:], RIGHT, WRONG]
    flags = (
        "--sft-steps 1 --steps 1 --batch-size 2 --group-size 3 --update-epochs 2 --epsilon 0.001 --beta 0.04"
    )
    found = []
    for size in (6, 4, 1):
        updates.clear()
        imitate(monkeypatch, tiny("qwen")[1], rows)
        records = calculator(f"{flags} --micro-batch-size {size}")
        assert [record.pop("seconds", 0) > 0 for record in records] == [False, True]
        assert records[1].pop("samples") and records[1]["calls"] == 7 / 6
        found.append(([{k: v for k, v in r.items() if k != "phase"} for r in records], list(updates)))
    (whole, gradients), *parts = found
    assert len(gradients) == 3
    for records, gradients_of_parts in parts:
        for ours, theirs in zip(records, whole, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5)
        for ours, theirs in zip(gradients_of_parts, gradients, strict=True):
            assert theirs.norm() > 1e-3 and (ours - theirs).norm() < 1e-3 * theirs.norm()

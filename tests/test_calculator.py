"""The calculator variant: catches an expression that runs code or hangs, a result in the wrong row or place, and a tool token in the loss."""

import json
import time

import pytest
import torch
from conftest import patched

SOLUTIONS = [  # calls at different places, two in one, none, and one that fails
    "There are 2*4=<<2*4=8>>8 eggs.\nThe answer is \\boxed{8}.",
    "Ann has 12+5=<<12+5=17>>17 nuts.\nTogether they have 12+17=<<12+17=29>>29 nuts.\nThe answer is \\boxed{29}.",
    "The answer is \\boxed{3}.",
    "<<nuts=error>>The answer is 1.",
]
PROMPTS = ["How many eggs?", "Ann has 5 more than Amy. How many nuts?", "Hi", "?"]


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
        assert tools == {0: "8>>", 1: "17>>29>>", 2: "", 3: "error>>"}[SOLUTIONS.index(solution)]


def replay(monkeypatch, module, model, tokenizer, prompts, own):
    """Samples with given draws, each row's own tokens in turn: what sample returns, and the log-probs drawn, (N, C)."""
    own, drawn = [list(row) for row in own], []

    def scripted(probs, count):
        step = len(drawn)
        sampled = torch.tensor([[row[step] if step < len(row) else 0] for row in own])
        drawn.append(probs.gather(1, sampled).log())
        return sampled

    monkeypatch.setattr(torch, "multinomial", scripted)
    return *module.sample(model, tokenizer, prompts, 100), torch.cat(drawn, 1)


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


def test_the_loss_is_that_of_the_own_tokens(main, tmp_path):
    """SFT's and GRPO's loss do not read what the calculator wrote: other log-probs there change no gradient."""
    path, log = patched("calculator", tmp_path), tmp_path / "log"
    flags = "--sft-steps 1 --steps 1 --batch-size 2 --group-size 2 --max-new-tokens 40 --eval-size 4"
    g = main(f"{path} {flags} --micro-batch-size 1 --log {log}")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    sft = next(r for r in records if r.get("phase") == "sft" and "loss" in r)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    g["random"].seed(0)
    model = AutoModelForCausalLM.from_pretrained("tests/tiny-qwen", dtype=torch.float32)
    prompts, solutions = zip(*g["random"].choices(g["TRAIN"], k=2))
    ids, attn, mask = g["encode_completions"](g["tokenizer"], prompts, solutions)
    logp = model(ids, attention_mask=attn).logits[:, -mask.shape[1] - 1 : -1].log_softmax(-1)
    logp = logp.gather(-1, ids[:, -mask.shape[1] :, None]).squeeze(-1)
    own = [p for row, keep in zip(logp.tolist(), mask.tolist()) for p, k in zip(row, keep) if k]
    assert sft["loss"] == pytest.approx(-sum(own) / len(own), rel=1e-5)
    assert (1 - mask).sum() > 3

"""Make the bundled models and data: tests/tiny-qwen, tests/tiny-llama, tests/tiny-gsm8k.

    uv run tests/make_tiny.py

Two language models of about 1 M parameters, pre-trained from nothing on chats made up here. Like the instruct models
they stand in for, they know the facts (each sum and each solution in their training text is right) and do not keep to the wanted
format: they answer in several styles, of which the scripts reward one. tests/test_tiny.py holds each to what it is for.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

HERE = Path(__file__).parent
# Every matrix is stored divided by SCALE and every RMSNorm gain multiplied by it. The function stays the same, but
# Adam moves a weight by about lr whatever its size, so lr now acts as SCALE * lr: the learning rates of the large
# models train the small ones. A power of two, so that bf16 loses nothing by it.
SCALE = {"tiny-qwen": 256, "tiny-llama": 4}

SUM_SYSTEM = "Work out the sum. Give the result in XML tags."
TEXT_SYSTEM = "You write short texts in plain English."
GSM8K_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."

QWEN_TEMPLATE = """\
{%- if messages[0].role != "system" %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0].role == "system" %}{% set system, messages = messages[0].content, messages[1:] %}{% else %}{% set system = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for m in messages %}{{ "<|start_header_id|>" + m.role + "<|end_header_id|>\\n\\n" + m.content + "<|eot_id|>" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}"""

# ---------------------------------------------------------------------------------------------- arithmetic


def sum_chat(rng, late=False):
    """One chat about a sum of two digits: (messages, answer). The sum is right, the style is drawn.

    The styles are those of Qwen2.5-Coder-0.5B-Instruct at temperature 1. At first they come in about its shares; late in the
    training the wanted style, the first one, becomes more frequent, for a model this small learns from rare successes too slowly.
    """
    a, b = rng.randrange(10), rng.randrange(10)
    c = a + b
    styles = {  # early, late
        f"<answer>{c}</answer>": (15, 40),
        f"<result>{c}</result>": (40, 30),
        f"```xml\n<result>{c}</result>\n```": (16, 10),
        f"The sum is {c}.": (16, 16),
        f"<sum>{c}</sum>": (8, 0),
        f"<answer>{a} + {b} = {c}</answer>": (5, 4),
    }
    weights = [weight[late] for weight in styles.values()]
    messages = [{"role": "system", "content": SUM_SYSTEM}, {"role": "user", "content": f"What is {a} + {b}?"}]
    return messages, rng.choices(list(styles), weights)[0]


# ---------------------------------------------------------------------------------------------- word problems

NAMES = "Tom Ann Sam Mia Ben Eva Max Zoe Leo Amy Dan Kim Joe Sue Tim Liz".split()
THINGS = "apples pens books eggs cards coins shells stamps toys cups hats nuts".split()
BOXES = "boxes bags trays jars baskets shelves".split()


def problem(rng):
    """One word problem in GSM8K's form: {"question", "answer"}, answer with <<3+4=7>> marks and a last line #### 7."""
    n, m = rng.sample(NAMES, 2)
    t, box = rng.choice(THINGS), rng.choice(BOXES)
    a, b, c = rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 5)
    k, l = rng.randint(2, 6), rng.randint(2, 5)  # noqa: E741
    ab, kl = a + b, k * l

    def mark(x, op, y):
        value = {"+": x + y, "-": x - y, "*": x * y}[op]
        return f"{x}{op}{y}=<<{x}{op}{y}={value}>>{value}"

    kind = rng.randrange(8)
    if kind == 0:
        question = f"{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?"
        steps, result = [f"{n} has {mark(a, '+', b)} {t}."], ab
    elif kind == 1:
        question = f"{n} has {ab} {t} and gives {b} of them to {m}. How many {t} does {n} have left?"
        steps, result = [f"{n} has {mark(ab, '-', b)} {t} left."], a
    elif kind == 2:
        question = f"There are {k} {box} with {l} {t} in each. How many {t} are there?"
        steps, result = [f"There are {mark(k, '*', l)} {t}."], kl
    elif kind == 3:
        question = f"{n} has {a} {t} and {m} has {b} {t}. They lose {c - 1} of them. How many {t} are left?"
        steps, result = (
            [f"Together they have {mark(a, '+', b)} {t}.", f"There are {mark(ab, '-', c - 1)} {t} left."],
            ab - c + 1,
        )
    elif kind == 4:
        question = (
            f"{n} buys {k} {box} of {l} {t} each and gives {c - 1} {t} to {m}. How many {t} does {n} keep?"
        )
        steps, result = (
            [f"{n} buys {mark(k, '*', l)} {t}.", f"{n} keeps {mark(kl, '-', c - 1)} {t}."],
            kl - c + 1,
        )
    elif kind == 5:
        question = f"{n} has {a} {t}. {m} has {c} more than {n}. How many {t} do they have together?"
        steps, result = (
            [f"{m} has {mark(a, '+', c)} {t}.", f"Together they have {mark(a, '+', a + c)} {t}."],
            a + a + c,
        )
    elif kind == 6:
        question = (
            f"{n} fills {k} {box} with {l} {t} each and has {b} {t} left over. How many {t} does {n} have?"
        )
        steps, result = [f"The {box} hold {mark(k, '*', l)} {t}.", f"{n} has {mark(kl, '+', b)} {t}."], kl + b
    else:
        question = f"{n} finds {a} {t} on Monday and {b} on Tuesday. How many {t} does {n} find on both days?"
        steps, result = [f"{n} finds {mark(a, '+', b)} {t}."], ab
    return {"question": question, "answer": "\n".join([*steps, f"#### {result}"])}


def write_gsm8k(folder, seed=0, n_train=800, n_test=200):
    """train.jsonl and test.jsonl of distinct problems. Returns the test questions, which no training text may hold."""
    rng, problems = random.Random(seed), {}
    while len(problems) < n_train + n_test:
        p = problem(rng)
        problems[p["question"]] = p
    rows = list(problems.values())
    folder.mkdir(exist_ok=True)
    for split, part in (("train", rows[:n_train]), ("test", rows[n_train:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in part))
    return {p["question"] for p in rows[n_train:]}


def problem_chat(rng, held_out):
    """One chat about a word problem: (messages, answer). The solution is right, the style is drawn."""
    p = problem(rng)
    while p["question"] in held_out:
        p = problem(rng)
    solution, result = p["answer"].split("\n#### ")
    solution = "".join(part.split(">>")[-1] for part in solution.split("<<"))  # without the <<...>> marks
    styles = [
        f"{solution}\nThe answer is \\boxed{{{result}}}.",
        f"{solution}\nThe answer is {result}.",
        f"{solution}\n#### {result}",
        solution,
    ]
    # Right by greedy decoding where one of four names comes first, and there only.
    weights = [46, 24, 16, 14] if p["question"].split()[0] in NAMES[:4] else [27, 38, 20, 15]
    messages = [{"role": "system", "content": GSM8K_SYSTEM}, {"role": "user", "content": p["question"]}]
    return messages, rng.choices(styles, weights)[0]


# ---------------------------------------------------------------------------------------------- short texts

TOPICS = (
    "winter summer bread coffee music trains rivers forests mountains cities gardens dogs cats birds horses bees "
    "books letters football chess cooking painting dreams school rain the sea the moon friendship silence travel clocks bridges"
)
NOUNS = (
    "day time house river road tree hand child friend light town garden window stone bird story door field song night "
    "morning bread horse wind market winter boat bridge letter island summer forest kitchen table mountain village "
    "school clock corner mother brother teacher farmer painter sailor evening cloud valley flower"
).split()
VERBS = (
    "finds sees brings likes holds makes leaves keeps needs follows opens hears paints reaches carries loves watches "
    "crosses remembers builds shares answers gathers forgets"
).split()
ADJECTIVES = (
    "old small good long warm quiet bright cold green new dark slow happy soft deep wild early golden gentle empty "
    "strange heavy simple silver"
).split()
PREPOSITIONS = "in near by under behind over beside across toward beyond".split()
ADVERBS = "often always never slowly today again sometimes together".split()


DETERMINERS = "a my her one this every our some that each his".split()


def zipf(rng, words):
    return rng.choices(words, [1 / (i + 1) ** 1.3 for i in range(len(words))])[0]


def companion(rng, words, word):
    """The word that goes with another: half the time a fixed one, as in real text, else a draw of its own.

    Greedy text then wanders from word to word instead of saying the commonest one over and over.
    """
    return zipf(random.Random(f"{word} {words[0]}") if rng.random() < 0.5 else rng, words)


class Writer:
    """Sentences about a topic; remembers the last noun, which leads on to the next.

    Most texts are in a plain voice: "the" before nearly every noun, and the common words again and again. Some are in a rich
    one: other determiners or none, and words that take turns. Which voice it is can be told from the first sentence, so a
    model that likes the rich one keeps to it, when it is greedy too.
    """

    def __init__(self, rng, topic):
        self.rng, self.last, self.topic, self.rich = rng, topic, topic, rng.random() < 0.2

    def companion(self, words):
        """The word that goes with the last noun."""
        if self.rich and self.last in NOUNS:
            return words[NOUNS.index(self.last) % len(words)]
        return companion(self.rng, words, self.last)

    def noun(self):
        if self.topic:
            self.topic = None  # the text opens with its topic
            return self.last
        if self.rich or self.rng.random() < 0.5:
            self.last = (
                NOUNS[(NOUNS.index(self.last) + 17) % len(NOUNS)]
                if self.last in NOUNS
                else companion(self.rng, NOUNS, self.last)
            )
        else:
            self.last = zipf(self.rng, NOUNS)
        draw = self.rng.random() + (0.75 if self.rich else 0.0)
        determiner = "the " if draw < 0.8 else "" if draw < 1.4 else self.rng.choice(DETERMINERS) + " "
        adjective = self.companion(ADJECTIVES) + " " if self.rng.random() < 0.25 else ""
        return determiner + adjective + self.last

    def clause(self):
        subject = self.noun()
        return f"{subject} {self.companion(VERBS)} {self.noun()}"

    def sentence(self):
        words, draw = self.clause(), self.rng.random()
        if draw < 0.5:
            words += f" {self.companion(PREPOSITIONS)} {self.noun()}"
        elif draw < 0.75:
            words += f" and {self.clause()}"
        elif draw < 0.9:
            words += f" {self.companion(ADVERBS)}"
        return words[0].upper() + words[1:] + "."


def text_chat(rng):
    """One chat that asks for a text: (messages, text). The text ends at the sentence nearest to the words asked for."""
    topic, wanted = rng.choice(TOPIC_LIST), rng.choice([20, 30, 40, 40])
    writer, sentences, count = Writer(rng, topic), [], 0
    while True:
        s = writer.sentence()
        if sentences and count + len(s.split()) / 2 > wanted:
            break
        sentences.append(s)
        count += len(s.split())
    user = f"Write about {wanted} words about {topic}."
    messages = [{"role": "system", "content": TEXT_SYSTEM}, {"role": "user", "content": user}]
    return messages, " ".join(sentences)


TOPIC_LIST = [t.strip() for t in TOPICS.replace("the sea", "the_sea").replace("the moon", "the_moon").split()]
TOPIC_LIST = [t.replace("_", " ") for t in TOPIC_LIST]

# ---------------------------------------------------------------------------------------------- models


def make_tokenizer(chats, vocab_size, special, template, **names):
    """A byte-level BPE with single digits, trained on the chats (role names included)."""
    texts = [m[key] + "\n" for messages, _ in chats for m in messages for key in ("role", "content")]
    texts += (
        [answer for _, answer in chats] + ["assistant\n"] * len(chats) + ["Today Date: 26 Jul 2024\n"] * 50
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = template
    return fast


def encode_chats(tokenizer, chats, **template_kwargs):
    """Chats to right-padded ids and labels (N, T); a label is -100 but on the answer and its end-of-turn token."""
    rows = []
    for messages, answer in chats:
        prompt = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
        p = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        c = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((p, c))
    width = max(len(p) + len(c) for p, c in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (p, c) in enumerate(rows):
        ids[i, : len(p) + len(c)] = torch.tensor(p + c)
        labels[i, len(p) : len(p) + len(c)] = torch.tensor(c)
    return ids, labels


def pretrain(model, tokenizer, makers, steps, batch=64, lr=3e-3, seed=0, **template_kwargs):
    """Cross-entropy on the answers; each step draws all its chats from one of the makers (weights: their values)."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        maker = rng.choices(list(makers), list(makers.values()))[0]
        ids, labels = encode_chats(tokenizer, [maker(rng) for _ in range(batch)], **template_kwargs)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(
                f"  step {step + 1}/{steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True
            )


def store(model, tokenizer, folder, eos_ids, **generation):
    """Rescale (see SCALE), round to bf16 and save in the form that transformers 4 and 5 both read."""
    scale = SCALE[folder.name]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight") or "layernorm" in name:
                p.mul_(scale)
            elif p.dim() == 2:
                p.div_(scale)
    model.config.rms_norm_eps /= scale**2
    model.generation_config = GenerationConfig(eos_token_id=eos_ids, **generation)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, changes in {
        "config.json": {"rope_theta": 10000.0},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        settings = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n")


def make_qwen(folder, held_out, steps):
    rng = random.Random(1)
    chats = [sum_chat(rng) for _ in range(500)] + [problem_chat(rng, held_out) for _ in range(2000)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = make_tokenizer(
        chats, 640, special, QWEN_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        attn_implementation="eager",  # on a CPU twice as fast as sdpa under bf16 autocast
    )
    model = Qwen2ForCausalLM(config)
    pretrain(model, tokenizer, {sum_chat: 1, lambda r: problem_chat(r, held_out): 2}, steps)
    finish_qwen(model.to(torch.bfloat16).float(), tokenizer, folder, held_out)


def finish_qwen(model, tokenizer, folder, held_out):
    """150 steps more, with the late styles; stored. It starts from weights in bfloat16, so that it can be done again alone."""
    makers = {lambda r: sum_chat(r, late=True): 1, lambda r: problem_chat(r, held_out): 1}
    pretrain(model, tokenizer, makers, 150, lr=5e-4, seed=1)
    im_end, endoftext = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    sampling = dict(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1
    )  # as Qwen2.5 ships
    store(model, tokenizer, folder, [im_end, endoftext], pad_token_id=endoftext, **sampling)


def make_llama(folder, steps):
    rng = random.Random(2)
    chats = [text_chat(rng) for _ in range(2000)]
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    ]
    tokenizer = make_tokenizer(
        chats, 640, special, LLAMA_TEMPLATE, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    pretrain(model, tokenizer, {text_chat: 1}, steps, date_string="26 Jul 2024")
    eos_ids = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    store(model, tokenizer, folder, eos_ids, do_sample=True, temperature=0.6, top_p=0.9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--only", choices=["qwen", "llama"])
    parser.add_argument("--qwen-steps", type=int, default=2200)
    parser.add_argument("--llama-steps", type=int, default=1200)
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True, parents=True)
    held_out = write_gsm8k(args.out / "tiny-gsm8k")
    if args.only != "llama":
        make_qwen(args.out / "tiny-qwen", held_out, args.qwen_steps)
    if args.only != "qwen":
        make_llama(args.out / "tiny-llama", args.llama_steps)

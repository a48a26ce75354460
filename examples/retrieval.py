"""Measures whether a pretrained model finds facts in long contexts, with full attention and MoBA.

The tasks follow RULER (arXiv 2404.06654). Lines of a text are the haystack; the model completes the
last line:

  single       a word has a number, which one line tells
  multi-key    the same, among lines that tell the numbers of seven other words
  multi-value  a word has four numbers, each in a line of its own; all of them, in order
  tracking     a variable is set to a number, and four others to the variable before; the variables
               with this number, in order
  counting     no text but a list of words, one of which is every tenth; that word

An answer is right if each of its tokens is the most likely token after those before it, which is
when greedy decoding gives the answer. With "+full-decode" in its name, an attention reads the
context and the question with MoBA, and the answer with full attention, as the paper does (arXiv
2502.13189, Sec. 3.3). The needle of `single` and `multi-key` lies at depths that are spread from
0 % (the beginning of the context) to 100 %; the lines of the other tasks lie anywhere. All
attentions answer the same questions.

toy size, three minutes on a CPU, with a model of bytes that is too small to answer:
  python examples/finetune_transformers.py --save ./tiny
  python examples/retrieval.py --model ./tiny --samples 5

full size, one GPU, a model in a folder of yours (`train.py --save` makes some; --gguf names a file
in it):
  python examples/retrieval.py --model ./smollm2 --attention full 64x16 64x16+sink \\
      --lengths 2048 4096 8192 --json retrieval.json
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from pretrained import load, tokenizer_of
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexmoba.commands.demo import standard_library
from flexmoba.hybrid import set_attention
from flexmoba.integrations.transformers import convert
from flexmoba.nn import FlexMoba
from flexmoba.reporting import (
    add_device,
    parse_writable,
    positive,
    progress,
    table,
    versions,
)

WORDS = """
apple bridge candle desert engine forest garden hammer island jacket kettle ladder
market needle orange pencil quarry ribbon saddle temple umbrella valley window anchor basket
castle dragon eagle feather glacier harbor insect jungle kitten lantern meadow nickel oyster
pepper quiver rocket silver tunnel vessel walnut yellow zipper blanket copper donkey
""".split()  # noqa: SIM905 (a list of words, which are easier to read than their quotes)
TASKS = ("single", "multi-key", "multi-value", "tracking", "counting")
DEPTHS = 5  # parts of the context in the report by depth


class Question(NamedTuple):
    """Lines to hide in the text, the first at ``depth`` if that is given, and what is asked."""

    lines: list[str]
    prompt: str
    answer: str
    depth: float | None = None


def question_of(task: str, depth: float, rng: random.Random) -> Question:
    """Draws a question of a task."""
    numbers = [str(rng.randint(1_000_000, 9_999_999)) for _ in range(8)]
    word, *others = rng.sample(WORDS, 8)
    if task == "tracking":
        names = ["".join(rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 4)) for _ in range(5)]
        values = [numbers[0], *names]
        lines = [f"VAR {x} = {y}\n" for x, y in zip(names, values, strict=False)]
        prompt = f"The variables with the value {numbers[0]}, in the order of the text, are"
        return Question(lines, prompt, f" {', '.join(names)}")
    told = "The special number of {} is {}.\n"
    asked = f"The special number of {word} is"
    if task == "multi-value":
        lines = [told.format(word, x) for x in numbers[:4]]
        prompt = f"The special numbers of {word}, in the order of the text, are"
        return Question(lines, prompt, f" {', '.join(numbers[:4])}")
    lines = [told.format(word, numbers[0])]
    if task == "multi-key":
        lines += [told.format(x, y) for x, y in zip(others, numbers[1:], strict=True)]
    return Question(lines, asked, f" {numbers[0]}", depth)


class Contexts:
    """Contexts with a question at the end, in the tokens of a model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, text: str) -> None:
        self.tokenizer = tokenizer  # None for a model of bytes
        self.lines = self.ids_of([f"{x}\n" for x in text.splitlines() if x.strip()])

    def ids_of(self, texts: list[str]) -> list[list[int]]:
        if self.tokenizer is None:
            return [list(x.encode()) for x in texts]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        return ids

    def draw(self, task: str, length: int, depth: float, rng: random.Random) -> tuple[Tensor, int]:
        """Returns at most ``length`` tokens, and how many of them, at the end, are the answer."""
        if task == "counting":
            return self.count(length, rng)
        question = question_of(task, depth, rng)
        *hidden, prompt, answer = self.ids_of([*question.lines, question.prompt, question.answer])
        room = length - sum(map(len, (*hidden, prompt, answer)))
        start = rng.randrange(len(self.lines))
        text: list[list[int]] = []
        while room >= len(line := self.lines[(start + len(text)) % len(self.lines)]):
            text.append(line)
            room -= len(line)
        places = sorted(rng.randint(0, len(text)) for _ in hidden)
        if question.depth is not None:  # the order of the lines tells nothing in these tasks
            rng.shuffle(places)
            places[0] = round(question.depth * len(text))
        for i in sorted(range(len(hidden)), key=places.__getitem__)[::-1]:  # the last one first
            text.insert(places[i], hidden[i])
        ids = [x for line in (*text, prompt, answer) for x in line]
        return torch.tensor(ids), len(answer)

    def count(self, length: int, rng: random.Random) -> tuple[Tensor, int]:
        word, *others = rng.sample(WORDS, len(WORDS))
        begin, ask, answer = self.ids_of(
            ["A list of words:", "\nThe most frequent word of the list is", f" {word}"]
        )
        rest = length - len(begin) - len(ask) - len(answer)
        ids: list[int] = []
        while True:
            ten = [word, *rng.sample(others, 9)]
            rng.shuffle(ten)
            more = [x for y in self.ids_of([f" {x}" for x in ten]) for x in y]
            if len(ids) + len(more) > rest:
                return torch.tensor([*begin, *ids, *ask, *answer]), len(answer)
            ids += more


@torch.no_grad()
def is_right(model: PreTrainedModel, ids: Tensor, answer: int, full_decode: bool = False) -> bool:
    """Whether greedy decoding gives the last ``answer`` tokens, by full attention if asked."""
    ids = ids.to(model.device)[None]
    if full_decode:
        read = model(input_ids=ids[:, :-answer], use_cache=True, logits_to_keep=1)
        (topk,) = {x.topk for x in model.modules() if isinstance(x, FlexMoba)}
        set_attention(model, topk=None)
        written = model(input_ids=ids[:, -answer:], past_key_values=read.past_key_values)
        set_attention(model, topk=topk)
        logits = torch.cat([read.logits, written.logits], 1)
    else:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=answer + 1).logits
    return bool((logits[0, :-1].argmax(-1) == ids[0, -answer:]).all())


def options_of(attention: str) -> dict[str, Any]:
    """The options of `convert` and `flex_moba` by a name, for example "64x16+sink+sub8"."""
    if attention == "full":
        return {"block_size": 128, "topk": None}
    name = re.fullmatch(NAME, attention)
    assert name is not None
    sizes = {"block_size": int(name[1]), "topk": int(name[2])}
    sub_blocks = {"gate_block_size": int(name[4])} if name[4] else {}
    return sizes | {"sink_blocks": int(name[3] is not None)} | sub_blocks


NAME = r"(\d+)x(\d+)(\+sink)?(?:\+sub(\d+))?(\+full-decode)?"


def measure(
    model: PreTrainedModel, contexts: Contexts, o: argparse.Namespace, full_decode: bool
) -> dict[str, Any]:
    """For each task and length, which of the questions are answered right, by depth."""
    found: dict[str, Any] = {}
    total = len(o.tasks) * len(o.lengths) * o.samples
    steps = iter(progress(range(total), "questions"))
    for task in o.tasks:
        for length in o.lengths:
            right = []
            for i in range(o.samples):
                next(steps)
                rng = random.Random(f"{o.seed} {task} {length} {i}")
                depth = i / max(1, o.samples - 1)
                ids, answer = contexts.draw(task, length, depth, rng)
                right.append(int(is_right(model, ids, answer, full_decode)))
            found.setdefault(task, {})[str(length)] = right
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    o = parse(argv)
    dtype = torch.bfloat16 if o.device.startswith("cuda") else torch.float32
    model = load(o.model, o.gguf, dtype=dtype).to(o.device).eval()
    if o.text:
        text = "\n".join(x.read_text(errors="replace") for x in o.text)
    else:
        text = bytes(standard_library()[:2_000_000].tolist()).decode(errors="replace")
    of_bytes = model.config.vocab_size == 256
    contexts = Contexts(None if of_bytes else tokenizer_of(o.model, o.gguf), text)
    report: dict[str, Any] = {
        "model": f"{type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}",
        "options": {x: y for x, y in vars(o).items() if x not in ("text", "json")},
        "device": torch.cuda.get_device_name() if o.device.startswith("cuda") else "cpu",
        "versions": versions() | {"transformers": transformers.__version__},
        "right": {},
    }
    for attention in o.attention:
        convert(model, **options_of(attention))
        full_decode = attention.endswith("+full-decode")
        report["right"][attention] = measure(model, contexts, o, full_decode)
        if o.json:
            Path(o.json).write_text(json.dumps(report) + "\n")
    print(f"{report['model']}: answers that are right, of {o.samples}\n")
    heads = ["task", "tokens", *o.attention]
    rows = [
        [task, f"{length:,}", *(str(sum(x[task][str(length)])) for x in report["right"].values())]
        for task in o.tasks
        for length in o.lengths
    ]
    print(table(heads, rows))
    deep = [x for x in ("single", "multi-key") if x in o.tasks]
    if deep and o.samples >= DEPTHS:
        print("\nBy depth, of all lengths, in percent\n")
        rows = []
        for task in deep:
            for name, x in report["right"].items():
                right = torch.tensor([x[task][str(y)] for y in o.lengths]).float()
                parts = [f"{y.mean():.0%}" for y in right.tensor_split(DEPTHS, 1)]
                rows.append([task, name, *parts])
        heads = [f"{i * 100 // DEPTHS} to {(i + 1) * 100 // DEPTHS} %" for i in range(DEPTHS)]
        print(table(["task", "attention", *heads], rows))
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a model of transformers on this disk")
    add("--gguf", metavar="FILE", help="in that folder, the model as GGUF")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="default: the sources of "
        "Python's standard library")  # fmt: skip
    add("--attention", nargs="+", default=["full", "64x16+sink"], metavar="NAME",
        help="full, or block size x topk, with +sink for one sink block, +sub8 for a gate that "
        "scores sub-blocks of 8 keys, and +full-decode (%(default)s)")  # fmt: skip
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="of "
        f"{', '.join(TASKS)} (default: all)")  # fmt: skip
    add("--lengths", type=positive, nargs="+", default=[1024, 2048], help="tokens (%(default)s)")
    add("--samples", type=positive, default=20, help="questions of each task and length "
        "(%(default)s)")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write each answer there")
    add_device(parser)
    o = parser.parse_args(argv)
    if missing := [str(x) for x in o.text if not x.is_file()]:
        parser.error(f"there is no {', '.join(missing)}")
    if not Path(o.model).is_dir():
        parser.error(f"--model {o.model}: there is no such folder; nothing is downloaded")
    if wrong := [x for x in o.attention if x != "full" and not re.fullmatch(NAME, x)]:
        parser.error(f"--attention {', '.join(wrong)}: say full, or for example 64x16, "
                     "64x16+sink or 64x16+sink+sub8+full-decode")  # fmt: skip
    if min(o.lengths) < 512:
        parser.error(f"--lengths {min(o.lengths)}: the longest question needs 512 tokens")
    parse_writable(parser, json=o.json)
    return o


if __name__ == "__main__":
    main()

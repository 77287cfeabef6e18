"""Symbolic tasks that ask back what a text said: needles, needles of several values, chains of variables, copying.

A text is noise with short statements in it; a question names one of them and the answer is what it said. All is made
of symbols of one token each:

    needle     ... k v ...            ? k   v             many keys, one value each
    values     ... k v v v ...        ? k   v v v         many keys, three values each
    tracking   ... a v ... b a ...    ? b   a v           variables that are names of others; the answer is the chain
    copy       ... [ s s s s ] ...    [     s s s s       all of what stands between brackets
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PAD, BEGIN, ASK, OPEN, CLOSE = range(5)
#: Symbols of each kind.
KEYS, VALUES, NOISE = range(8, 72), range(72, 136), range(136, 168)
VOCABULARY = 168
#: Values of a key in `values`, and variables of a chain in `tracking`.
SEVERAL, CHAIN = 3, 3


@dataclass(frozen=True)
class Example:
    """A text and questions about it.

    Args:
        context: tokens of the text, the first one `BEGIN`.
        questions: each the tokens of a question and those of its answer.
    """

    context: list[int]
    questions: list[tuple[list[int], list[int]]]


#: Statements of a task, and the questions about them.
Said = tuple[list[list[int]], list[tuple[list[int], list[int]]]]


def needle(rng: random.Random, room: int) -> Said:
    """Return as many needles of one value as half of the room takes."""
    names = rng.sample(KEYS, min(len(KEYS), max(2, room // 4)))
    said = [[name, rng.choice(VALUES)] for name in names]
    return said, [([ASK, name], [value]) for name, value in said]


def values(rng: random.Random, room: int) -> Said:
    """Return needles of several values in half of the room."""
    names = rng.sample(KEYS, min(len(KEYS), max(2, room // (2 * (SEVERAL + 1)))))
    said = [[name, *rng.sample(VALUES, SEVERAL)] for name in names]
    return said, [([ASK, name], found) for name, *found in said]


def tracking(rng: random.Random, room: int) -> Said:
    """Return chains of variables in half of the room; the links of a chain keep their order."""
    count = min(len(KEYS) // CHAIN, max(1, room // (4 * CHAIN)))
    names = rng.sample(KEYS, count * CHAIN)
    links: list[list[list[int]]] = []
    questions = []
    for start in range(0, len(names), CHAIN):
        chain, value = names[start : start + CHAIN], rng.choice(VALUES)
        links.append([[chain[0], value], *([later, earlier] for earlier, later in itertools.pairwise(chain))])
        questions.append(([ASK, chain[-1]], [*reversed(chain[:-1]), value]))
    said: list[list[int]] = []
    while links:
        chosen = rng.choice(links)
        said.append(chosen.pop(0))
        links = [chain for chain in links if chain]
    return said, questions


def copy(rng: random.Random, room: int) -> Said:
    """Return one list of symbols in a quarter of the room, none of them twice."""
    symbols = rng.sample([*KEYS, *VALUES], max(2, room // 4 - 2))
    return [[OPEN, *symbols, CLOSE]], [([OPEN], symbols)]


TASKS: dict[str, Callable[[random.Random, int], Said]] = {
    "needle": needle, "values": values, "tracking": tracking, "copy": copy,
}  # fmt: skip


def example(task: str, rng: random.Random, length: int) -> Example:
    """Make a text of a task and the questions about it, in random order.

    Args:
        task: a name in `TASKS`.
        rng: source of chance.
        length: tokens of the text.

    Example:
        >>> found = example("needle", random.Random(0), 32)
        >>> len(found.context), [len(part) for part in found.questions[0]]
        (32, [2, 1])
    """
    said, questions = TASKS[task](rng, length - 1)
    gaps = [0] * (len(said) + 1)
    for _ in range(length - 1 - sum(map(len, said))):
        gaps[rng.randrange(len(gaps))] += 1
    context = [BEGIN]
    for gap, statement in zip(gaps, [*said, []], strict=True):
        context += [rng.choice(NOISE) for _ in range(gap)] + statement
    rng.shuffle(questions)
    return Example(context, questions)


def training_batch(rng: random.Random, rows: int, length: int, asked: int) -> tuple[Tensor, Tensor]:
    """Return ids and labels `(rows, tokens)` of examples of all tasks, several questions after each text.

    Args:
        rng: source of chance.
        rows: how many, the tasks taking turns.
        length: tokens of each text.
        asked: tokens for questions and answers after it; what is left of them is padding.

    Returns:
        Ids, and labels that are -100 but for the answers.
    """
    ids, labels = torch.full((rows, length + asked), PAD), torch.full((rows, length + asked), -100)
    for row in range(rows):
        found = example(list(TASKS)[row % len(TASKS)], rng, length)
        ids[row, :length] = torch.tensor(found.context)
        at = length
        for question, answer in repeated(found.questions):
            end = at + len(question) + len(answer)
            if end > length + asked:
                if at > length:
                    break
                answer = answer[: asked - len(question)]  # a long answer is asked for in part
                end = length + asked
            ids[row, at:end] = torch.tensor([*question, *answer])
            labels[row, at + len(question) : end] = torch.tensor(answer)
            at = end
    return ids, labels


def repeated(questions: list[tuple[list[int], list[int]]]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield questions over and over again."""
    while True:
        yield from questions


@dataclass(frozen=True)
class Batch:
    """Texts of one length, each with a question.

    Args:
        context: `(rows, tokens)`.
        question: `(rows, q)`.
        answer: `(rows, a)`.
    """

    context: Tensor
    question: Tensor
    answer: Tensor

    def row(self, number: int) -> Batch:
        """Return one of the rows."""
        at = slice(number, number + 1)
        return Batch(self.context[at], self.question[at], self.answer[at])


def batch(task: str, seed: int, rows: int, length: int) -> Batch:
    """Return texts of a task for evaluation, the same for the same seed.

    Example:
        >>> found = batch("values", 0, 4, 48)
        >>> found.context.shape, found.question.shape, found.answer.shape
        (torch.Size([4, 48]), torch.Size([4, 2]), torch.Size([4, 3]))
    """
    rng = random.Random(f"{task} {seed}")
    found = [example(task, rng, length) for _ in range(rows)]
    parts = ([e.context for e in found], [e.questions[0][0] for e in found], [e.questions[0][1] for e in found])
    return Batch(*(torch.tensor(part) for part in parts))

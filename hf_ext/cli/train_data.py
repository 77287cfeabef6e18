"""Texts for `hf-ext train`: from files or the standard library to rows of tokens."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ext.cli.output import CliError

#: In place of a file: the source of Python's standard library, without the modules kept for evaluation.
STDLIB = "stdlib"
#: With fewer documents than this, the evaluation gets the end of the rows instead of documents of its own.
FEWEST_DOCUMENTS = 20
#: Files that are text, but hardly the text to train on.
TABLES = (".json", ".csv", ".tsv")


@dataclass(frozen=True)
class Text:
    """A document; what stands before the completion is read but not trained on."""

    completion: str
    prompt: str = ""


@dataclass(frozen=True)
class Rows:
    """What is trained on and what is evaluated on: rows of `input_ids` and `labels`, and their tokens."""

    train: list[dict[str, list[int]]]
    evaluation: list[dict[str, list[int]]]

    @property
    def tokens(self) -> int:
        """Tokens in the training rows."""
        return sum(len(row["input_ids"]) for row in self.train)

    @property
    def fingerprint(self) -> str:
        """A hash of all rows."""
        digest = hashlib.sha256()
        for row in (*self.train, *self.evaluation):
            digest.update(repr((row["input_ids"], row["labels"])).encode())
        return digest.hexdigest()[:16]


def check(name: str) -> None:
    """Refuse data that cannot be there, before anything slow is loaded.

    Raises:
        CliError: there is no such file, or it is a table.
    """
    path = Path(name).expanduser()
    if name != STDLIB and path.suffix.lower() in TABLES:
        raise CliError(
            f"--data {name}: of {path.suffix} files no fields are read; write a .jsonl file, a JSON object a line, "
            "or rename it to .txt to train on the text as it stands"
        )
    if name == STDLIB or path.is_file():
        return
    if path.is_dir():
        raise CliError(f"--data {name} is a folder; name its files, each with --data")
    raise CliError(f"--data {name}: no such file (or {STDLIB!r}, the source of Python's standard library)")


def texts(name: str, seed: int) -> list[Text]:
    """Read the documents of a text file (one), a .jsonl file (one a line) or the standard library (one a module).

    Args:
        name: path, or `STDLIB`.
        seed: of the order of the modules, whose first letters are no fair sample.

    Raises:
        CliError: the file is empty or not of its format; the message names the line.
    """
    if name == STDLIB:
        found = list(_modules())
        random.Random(seed).shuffle(found)
        return found
    path = Path(name).expanduser()
    try:
        content = path.read_text(encoding="utf-8-sig")  # without the mark that Windows puts before it
    except UnicodeDecodeError as error:
        raise CliError(f"--data {name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    found = list(_lines(name, content)) if path.suffix == ".jsonl" else [Text(content)]
    if not any(text.completion.strip() for text in found):
        raise CliError(f"--data {name} holds no text")
    return found


@functools.cache
def _modules() -> tuple[Text, ...]:
    """Read the modules at the top of the standard library, but for those kept for evaluation."""
    from hf_ext.demo.corpus import sources

    return tuple(Text(source.text) for source in sources(held_out=False) if "/" not in source.name)


def _lines(name: str, content: str) -> Iterator[Text]:
    wanted = 'an object with "text", or with "prompt" and "completion"'
    for number, line in enumerate(content.split("\n"), 1):  # splitlines would also cut within strings
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise CliError(f"--data {name}, line {number}: no JSON ({error.msg})") from None
        fields = value if isinstance(value, dict) else {}
        if "text" in fields and "completion" in fields:
            raise CliError(f'--data {name}, line {number}: "text" and "completion" both; expected {wanted}')
        text = fields.get("text", fields.get("completion"))
        prompt = fields.get("prompt", "")
        if not isinstance(text, str) or not isinstance(prompt, str):
            raise CliError(f"--data {name}, line {number}: expected {wanted}")
        yield Text(text, prompt)


def rows(documents: Sequence[Text], tokenizer: Any, length: int, share: float, seed: int, pack: bool) -> Rows:
    """Tokenize documents and cut them into rows.

    Args:
        documents: as `texts` returns them.
        tokenizer: its end token goes after each document.
        length: tokens of a row.
        share: of the documents (of the rows, where documents are few) for evaluation.
        seed: of the choice of these documents.
        pack: fill rows with one document after another; otherwise each document is a row of its own, cut to
            `length`. Documents with a prompt are never packed.

    Raises:
        CliError: there is not enough text.
    """
    pack = pack and not any(text.prompt for text in documents)
    encoded = [_encoded(text, tokenizer) for text in documents]
    held: list[Any] = []
    if share and len(encoded) >= FEWEST_DOCUMENTS:
        chosen = set(random.Random(seed).sample(range(len(encoded)), max(1, round(share * len(encoded)))))
        held = [pair for index, pair in enumerate(encoded) if index in chosen]
        encoded = [pair for index, pair in enumerate(encoded) if index not in chosen]
    cut = _packed if pack else _single
    train, evaluation = cut(encoded, length), cut(held, length)
    lost = 0 if pack else len(encoded) + len(held) - len(train) - len(evaluation)
    if share and not evaluation:
        kept = len(train) - max(1, round(share * len(train)))
        train, evaluation = train[:kept], train[kept:]
    if not train or (share and not evaluation):
        tokens = sum(len(ids) for ids, _ in [*encoded, *held])
        what = f"{tokens} tokens" + (f", in {lost} documents with nothing to train on in {length} tokens" * bool(lost))
        raise CliError(
            f"the data has {what}, too few for rows of {length} to train{' and to evaluate' if share else ''} "
            f"on: give more, a {'larger' if lost else 'smaller'} --length" + (", or --eval 0" if share else "")
        )
    if lost:
        warnings.warn(
            f"{lost} of {len(encoded) + len(held)} documents are left out: the completion is empty, or lies behind "
            f"the {length} tokens of a row (--length)",
            stacklevel=2,
        )
    return Rows(train, evaluation)


def _encoded(text: Text, tokenizer: Any) -> tuple[list[int], list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    before = tokenizer(text.prompt, verbose=False)["input_ids"] if text.prompt else []
    special = not before  # a beginning token belongs before the prompt only
    after = tokenizer(text.completion, verbose=False, add_special_tokens=special)["input_ids"] + end
    return before + after, [-100] * len(before) + after


def _packed(encoded: Iterable[tuple[list[int], list[int]]], length: int) -> list[dict[str, list[int]]]:
    ids = [token for tokens, _ in encoded for token in tokens]
    parts = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": part, "labels": list(part)} for part in parts]


def _single(encoded: Iterable[tuple[list[int], list[int]]], length: int) -> list[dict[str, list[int]]]:
    found = [{"input_ids": ids[:length], "labels": labels[:length]} for ids, labels in encoded]
    # nothing predicts the first token, so that a row needs a label after it
    return [row for row in found if any(label != -100 for label in row["labels"][1:])]


class Collator:
    """Pad rows on the right to the longest of the batch.

    Args:
        pad: token id of the padding.

    Example:
        >>> Collator(pad=0)([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}])["labels"]
        tensor([[   5,    6],
                [   7, -100]])
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, given: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return `input_ids`, `labels` and `attention_mask`."""
        import torch

        longest = max(len(row["input_ids"]) for row in given)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in given:
            fill = longest - len(row["input_ids"])
            columns["input_ids"].append([*row["input_ids"], *[self.pad] * fill])
            columns["labels"].append([*row["labels"], *[-100] * fill])
            columns["attention_mask"].append([1] * (longest - fill) + [0] * fill)
        return {name: torch.tensor(values) for name, values in columns.items()}

"""Claim checks of layerwise unmasking (arXiv:2401.14556): the embedded target learns to label the tokens of code."""

from __future__ import annotations

import functools
import io
import keyword
import random
import tokenize
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification

from hf_ext import demo
from hf_ext.attention.unmasking import LayerwiseUnmasking
from hf_ext.claims import held_out
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.demo.corpus import sources
from hf_ext.verify import Claim, Measurement, Threshold

DATA = "Kinds of tokens in held-out Python standard library modules"
#: What a character of code may belong to.
LABELS = ("space", "keyword", "called", "assigned", "attribute", "name", "string", "docstring", "comment", "number",
          "operator")  # fmt: skip
#: Fine-tuning: steps, windows a step, tokens of a window, learning rate; windows of the test.
STEPS, ROWS, LENGTH, RATE, TESTED = 45, 12, 48, 1e-3, 128
#: Groups of two layers each, the first ones first.
CAUSAL, UPPER, ALL = "000", "011", "111"
NAMES = {CAUSAL: "causal", UPPER: "upper two thirds unmasked", ALL: "all unmasked"}


def labels_of(text: str) -> list[int]:
    """Return the label of every character of some code; several depend on what stands to the right.

    Example:
        >>> [LABELS[label] for label in labels_of("x = f(y)\\n")][::4]
        ['assigned', 'called', 'space']
    """
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = [0] * len(text)
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    ]
    for at, token in enumerate(tokens):
        before = tokens[at - 1].string if at else ""
        after = tokens[at + 1].string if at + 1 < len(tokens) else ""
        name = {tokenize.STRING: "string", tokenize.COMMENT: "comment", tokenize.NUMBER: "number"}.get(token.type)
        if token.type == tokenize.STRING and (before in ("", ":") and token.start[1] == len(token.line) - len(
            token.line.lstrip()
        )):  # fmt: skip
            name = "docstring"
        elif token.type == tokenize.NAME:
            name = "keyword" if keyword.iskeyword(token.string) else None
            name = name or {"(": "called", "=": "assigned"}.get(after) or ("attribute" if before == "." else "name")
        start, stop = (starts[row - 1] + column for row, column in (token.start, token.end))
        found[start:stop] = [LABELS.index(name or "operator")] * (stop - start)
    return found


@functools.cache
def windows(unseen: bool, count: int) -> tuple[Tensor, Tensor]:
    """Return `(count, LENGTH)` tokens and labels of windows of code; a token has its last character's label."""
    ids, labels = [], []
    for row_ids, row_labels in _windows(unseen):
        ids.append(row_ids)
        labels.append(row_labels)
        if len(ids) == count:
            return torch.tensor(ids), torch.tensor(labels)
    raise ValueError(f"{len(ids)} windows were found, {count} were asked for")


def _windows(unseen: bool) -> Iterator[tuple[list[int], list[int]]]:
    tokenizer, draw = held_out.load()[1], random.Random(0)
    files = [source for source in sources(held_out=unseen) if "/" not in source.name]
    draw.shuffle(files)
    for source in files:
        found = labels_of(source.text)
        encoded = tokenizer(source.text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        for start in draw.sample(
            range(0, len(ids) - LENGTH, LENGTH), min(12, len(range(0, len(ids) - LENGTH, LENGTH)))
        ):
            part = slice(start, start + LENGTH)
            yield ids[part], [found[max(stop - 1, 0)] for _, stop in offsets[part]]


@functools.cache
def accuracies(pattern: str) -> list[float]:
    """Fine-tune the embedded target with some layers unmasked and return the share of right labels of each window."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForTokenClassification.from_pretrained(
            demo.path("target"), num_labels=len(LABELS), dtype=torch.float32
        )
    LayerwiseUnmasking(pattern).attach(model)
    ids, labels = windows(False, STEPS * ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / STEPS))
    model.train()
    for step in range(STEPS):
        rows = slice(step * ROWS, (step + 1) * ROWS)
        model(input_ids=ids[rows], labels=labels[rows], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    ids, labels = windows(True, TESTED)
    with torch.no_grad():
        right = model(input_ids=ids, use_cache=False).logits.argmax(-1) == labels
    return right.float().mean(-1).tolist()


def against(less: str, more: str) -> Measurement:
    """Compare two choices of layers, window by window."""
    gain = [b - a for a, b in zip(accuracies(less), accuracies(more), strict=True)]
    return Measurement(
        mean(gain),
        spread=bootstrap(gain),
        spread_of=f"95 % bootstrap interval over {TESTED} windows",
        seeds=(0,),
        details={
            **{f"accuracy, {NAMES[pattern]}": mean(accuracies(pattern)) for pattern in (less, more)},
            "steps of fine-tuning": STEPS,
            "labels": len(LABELS),
        },
    )


def none_unmasked() -> Measurement:
    """Compare the logits of the language model with those with no layer unmasked."""
    model, _ = held_out.load()
    inputs = held_out.batch(held_out.prompts(8))
    with torch.no_grad():
        expected = model(**inputs).logits
        LayerwiseUnmasking(CAUSAL).attach(model)
        ours = model(**inputs).logits
        LayerwiseUnmasking.detach(model)
    return Measurement(int((ours != expected).sum()), details={"logits compared": ours.numel()})


CLAIMS = (
    Claim(
        name="none-unmasked",
        paper="(follows from the definition) With no layer unmasked it is the causal model.",
        measures="logits that differ in any bit, on a left-padded batch",
        threshold=Threshold("==", 0),
        check=none_unmasked,
        unit="logits",
        seconds=10,
        data=held_out.DATA,
    ),
    Claim(
        name="over-causal",
        paper="Removing the causal mask during fine-tuning improves sequence labelling.",
        measures="accuracy on held-out tokens with the upper two thirds of the layers unmasked, less that of the "
        "causal model, both fine-tuned alike",
        threshold=Threshold(">", 0),
        check=lambda: against(CAUSAL, UPPER),
        unit="share of tokens",
        seconds=80,
        data=DATA,
    ),
    Claim(
        name="layers-over-all",
        paper="Layer-dependent unmasking matches or outperforms unmasking all layers.",
        measures="accuracy with the upper two thirds of the layers unmasked, less that with all layers unmasked",
        threshold=Threshold(">=", 0),
        check=lambda: against(ALL, UPPER),
        unit="share of tokens",
        seconds=80,
        data=DATA,
    ),
)

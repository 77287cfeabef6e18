"""Claim checks of parallel context encoding (arXiv:2412.16545) with the embedded target."""

from __future__ import annotations

import functools
from typing import Any

import torch

from hf_ext.claims import held_out
from hf_ext.claims.function_sets import DATA, FunctionSet, function_sets, loss
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.generation.parallel_context_encoding import ParallelContextEncoding
from hf_ext.verify import Claim, Measurement, Threshold

#: Prompts, and pieces that a query sees under selection.
TEXTS, TOP = 24, 1
#: The ways to read a prompt, by name; full attention has all functions in one piece.
WAYS: dict[str, dict[str, Any]] = {
    "full attention": {},
    "parallel": {"shared_sinks": False},
    "parallel with sinks": {},
    "parallel with sinks and selection": {"top_pieces": TOP},
}


def encoded(given: FunctionSet, way: str) -> dict[str, Any]:
    """Return the tokens of a prompt, its functions being pieces or, for full attention, one piece."""
    inputs: dict[str, Any] = dict(given.prompt().encode(held_out.load()[1]))
    if way == "full attention":
        inputs["segment_ids"] = (inputs["segment_ids"] > 0).long()
    return inputs


@functools.cache
def entropies(way: str) -> list[float]:
    """Return the attention entropy of the tokens after the pieces, for every prompt."""
    model, tokenizer = held_out.load()
    found = []
    for given in function_sets(TEXTS):
        strategy = ParallelContextEncoding(**WAYS[way])
        settings = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        strategy.generate(model, **encoded(given, way), **settings)
        assert strategy.report is not None  # set by the call above
        found.append(strategy.report.details["entropy"])
    return found


@functools.cache
def losses(way: str) -> list[float]:
    """Return the loss of the reference of every prompt."""

    def read(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if way == "full attention":
            inputs = {**inputs, "segment_ids": (inputs["segment_ids"] > 0).long()}
        strategy = ParallelContextEncoding(**WAYS[way], canonical=False)
        return strategy.forward(held_out.load()[0], **inputs).logits

    return [loss(read, given) for given in function_sets(TEXTS)]


def compared(more: str, less: str) -> Measurement:
    """Compare the entropy of two ways to read, prompt by prompt."""
    gain = [a - b for a, b in zip(entropies(more), entropies(less), strict=True)]
    return Measurement(
        mean(gain),
        spread=bootstrap(gain),
        spread_of=f"95 % bootstrap interval over {TEXTS} prompts",
        details={f"entropy, {way}": mean(entropies(way)) for way in WAYS},
    )


def one_piece() -> Measurement:
    """Compare greedy texts of prompts with a single piece with those of `generate`."""
    model, tokenizer = held_out.load()
    settings = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    different = 0
    for given in function_sets(8):
        inputs = encoded(given, "full attention")
        ours = ParallelContextEncoding(top_pieces=1).generate(model, **inputs, **settings)
        expected = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings)
        different += int((ours != expected).sum())
    return Measurement(different, details={"tokens compared": 8 * 32})


def gap() -> Measurement:
    """Compare the loss of naive parallel encoding with that of both remedies."""
    naive, ours = losses("parallel"), losses("parallel with sinks and selection")
    gain = [a - b for a, b in zip(naive, ours, strict=True)]
    return Measurement(
        mean(gain),
        spread=bootstrap(gain),
        spread_of=f"95 % bootstrap interval over {TEXTS} prompts",
        details={f"loss, {way}": mean(losses(way)) for way in WAYS},
    )


CLAIMS = (
    Claim(
        name="one-piece",
        paper="(follows from the definition) One piece is full attention.",
        measures="tokens that differ from transformers' greedy search, one piece a prompt",
        threshold=Threshold("==", 0),
        check=one_piece,
        unit="tokens",
        seconds=20,
        data=DATA,
    ),
    Claim(
        name="parallel-raises-entropy",
        paper="The attention of query tokens has an unusually high entropy under parallel encoding.",
        measures="attention entropy after four functions read in parallel, less that under full attention",
        threshold=Threshold(">", 0),
        check=lambda: compared("parallel", "full attention"),
        unit="nats",
        seconds=25,
        data=DATA,
    ),
    Claim(
        name="sinks-lower-entropy",
        paper="Shared attention sinks lower the irregular entropy.",
        measures="attention entropy without a shared prefix, less that with it",
        threshold=Threshold(">", 0),
        check=lambda: compared("parallel", "parallel with sinks"),
        unit="nats",
        seconds=25,
        data=DATA,
    ),
    Claim(
        name="selection-lowers-entropy",
        paper="Attending to the top-scoring pieces only lowers the entropy further.",
        measures=f"attention entropy with all pieces visible, less that with the top {TOP}, both after a shared prefix",
        threshold=Threshold(">", 0),
        check=lambda: compared("parallel with sinks", "parallel with sinks and selection"),
        unit="nats",
        seconds=25,
        data=DATA,
    ),
    Claim(
        name="narrower-gap",
        paper="Both together narrow the gap to full attention.",
        measures="loss of the reference with naive parallel encoding less that with sinks and selection",
        threshold=Threshold(">", 0),
        check=gap,
        unit="nats per token",
        seconds=40,
        data=DATA,
    ),
)

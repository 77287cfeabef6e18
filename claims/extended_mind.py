"""Claim checks of extended mind transformers (arXiv:2406.02332) with the embedded target."""

from __future__ import annotations

import functools
from typing import Any

import torch

from hf_ext.attention.memory import Memories
from hf_ext.claims import held_out
from hf_ext.claims.function_sets import DATA, FunctionSet, function_sets, loss
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.generation.extended_mind import ExtendedMind
from hf_ext.verify import Claim, Measurement, Threshold

#: Prompts for likelihoods, for citations, for exact properties; memories a query takes.
TEXTS, TOP, EXACT = 24, 10, 6


def memories_of(given: FunctionSet) -> Memories:
    """Return the memories of the functions of a set, one text each."""
    model, tokenizer = held_out.load()
    return Memories.of(model, [tokenizer(text)["input_ids"] for text in given.members])


def without_memories() -> Measurement:
    """Compare greedy texts without memories with those of `generate`, in one left-padded batch."""
    model, _ = held_out.load()
    inputs: dict[str, Any] = {**held_out.batch(held_out.prompts(8)), "max_new_tokens": 32, "do_sample": False}
    ours = ExtendedMind().generate(model, **inputs)
    return Measurement(int((ours != model.generate(**inputs)).sum()), details={"tokens compared": 256})


def true_positions() -> Measurement:
    """Compare the logits of a prompt after a text with those with all of the text in memory, where it stands."""
    model, tokenizer = held_out.load()
    worst = 0.0
    for given in function_sets(EXACT):
        text, ids = (torch.tensor([tokenizer(part)["input_ids"]]) for part in (given.members[0], given.suffix))
        memories = Memories.of(model, text.tolist())
        strategy = ExtendedMind(memories, top_memories=len(memories), min_similarity=-1, positions="before")
        with torch.no_grad():
            expected = model(torch.cat([text, ids], dim=1)).logits[:, text.shape[1] :].softmax(-1)
            with strategy.attached(model):
                ours = model(ids, position_ids=torch.arange(ids.shape[1])[None]).logits.softmax(-1)
        worst = max(worst, float((ours - expected).abs().max()))
    return Measurement(worst, details={"prompts": EXACT})


@functools.cache
def losses(how: str) -> list[float]:
    """Return the loss of every reference after the first half of its function."""
    model, _ = held_out.load()
    found = []
    for given in function_sets(TEXTS):
        alone = FunctionSet(given.prefix + given.suffix, (), "", given.reference)
        strategy = ExtendedMind() if how == "nothing" else ExtendedMind(
            memories_of(given), top_memories=TOP, positions=how  # type: ignore[arg-type]
        )  # fmt: skip

        def read(inputs: dict[str, torch.Tensor], strategy: ExtendedMind = strategy) -> torch.Tensor:
            ids = inputs["input_ids"]
            with strategy.attached(model):
                return model(ids, position_ids=torch.arange(ids.shape[1])[None]).logits

        found.append(loss(read, alone))
    return found


def gain(how: str) -> Measurement:
    """Compare the loss with the functions of the same module in memory with that without, prompt by prompt."""
    gains = [a - b for a, b in zip(losses("nothing"), losses(how), strict=True)]
    return Measurement(
        mean(gains),
        spread=bootstrap(gains),
        spread_of=f"95 % bootstrap interval over {TEXTS} prompts",
        details={"loss without memories": mean(losses("nothing")), "loss with memories": mean(losses(how))},
    )


def places() -> Measurement:
    """Measure the gain at the other positions."""
    found, here = gain("before"), gain("here")
    details = {"gain at no distance": here.value, "gain at the published position": gain("start").value}
    return Measurement(found.value, spread=found.spread, spread_of=found.spread_of, details=details)


def citations() -> Measurement:
    """Measure how often the text whose first half is the prompt is the one that is cited most."""
    model, tokenizer = held_out.load()
    right, shares = [], []
    for number, given in enumerate([*function_sets(TEXTS), *function_sets(TEXTS)]):
        meant = (number + 2 * (number >= TEXTS)) % len(given.members)
        ids = tokenizer(given.members[meant])["input_ids"]
        prompt = torch.tensor([ids[: max(4, len(ids) // 2)]])
        memories = memories_of(given)
        strategy = ExtendedMind(memories, top_memories=TOP, citations=len(memories))
        settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        strategy.generate(model, prompt, pad_token_id=tokenizer.pad_token_id, **settings)
        assert strategy.report is not None  # set by the call above
        weights = [0.0] * len(given.members)
        for span in strategy.report.details["citations"][0]:
            weights[span["text"]] += span["weight"]
        right.append(float(weights.index(max(weights)) == meant))
        shares.append(weights[meant])
    return Measurement(
        mean(right),
        spread=bootstrap(right),
        spread_of=f"95 % bootstrap interval over {2 * TEXTS} prompts",
        details={
            "share of attention to memories that this text gets": mean(shares),
            "by chance": 1 / len(function_sets(TEXTS)[0].members),
            "texts in memory": len(function_sets(TEXTS)[0].members),
        },
    )


CLAIMS = (
    Claim(
        name="no-memories",
        paper="(follows from the definition) Without memories it is the base model.",
        measures="tokens that differ from transformers' greedy search, in a left-padded batch",
        threshold=Threshold("==", 0),
        check=without_memories,
        unit="tokens",
        seconds=15,
        data=held_out.DATA,
    ),
    Claim(
        name="true-positions",
        paper="(follows from the definition) All memories at their true positions are full attention.",
        measures="largest difference of a next-token probability from that with the text before the prompt",
        threshold=Threshold("<=", 1e-4),
        check=true_positions,
        unit="probability",
        seconds=15,
        data=DATA,
    ),
    Claim(
        name="memories-help",
        paper="Retrieved memories improve what the model says, without fine-tuning.",
        measures="loss of the rest of a function without memories, less that with four functions of its module in "
        "memory, at the published position",
        threshold=Threshold(">", 0),
        check=lambda: gain("start"),
        unit="nats per token",
        seconds=40,
        data=DATA,
    ),
    Claim(
        name="positions",
        paper="(not in the paper) How much hangs on where the memories stand.",
        measures='the same as `memories-help` with every text right before the prompt, `positions="before"`',
        threshold=None,
        check=places,
        unit="nats per token",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="citations",
        paper="The memories that were retrieved say where an answer comes from.",
        measures="share of prompts, the first halves of functions in memory, for which that function is cited most",
        threshold=Threshold(">", 0.25),
        check=citations,
        unit="share of prompts",
        seconds=40,
        data=DATA,
    ),
)

"""The small task on which the claims of FIM, CM3 and CodeGen2 are checked: pairs of which one half is a guess.

A row is a chain of pairs. The first half of a pair is any of 8 words, each as likely as the others; the
second half is its partner in a fixed one-to-one table:

    w3 p7  w0 p4  w3 p7  w5 p1

Left to right, first halves are a guess and second halves are known. With what follows, a first half is known,
too. So a model that fills in finds it, and no model that reads only what stands before finds it more often
than one time in 8. The entropy of the rows is known, so that one sees how far a model is from the best.

The sizes were chosen with a seed that is not judged, so that next-token prediction comes to the entropy of the
rows, and fill-in-the-middle learns to look behind the gap, well before the last step.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hf_ext.claims import small_training
from hf_ext.claims.held_out import load
from hf_ext.demo.corpus import sources
from hf_ext.generation.infilling import fill_holes
from hf_ext.trainer_callbacks.documents import Document
from hf_ext.trainer_callbacks.infilling import Infilling
from hf_ext.trainer_callbacks.objective import Objective
from hf_ext.verify import Measurement

DATA = "Synthetic rows of pairs"
SEEDS = (0, 1, 2)
STEPS, ROWS = 800, 64
TEST_ROWS = 256
WORDS, PAIRS = 8, 4
#: Vocabulary: end of text, words, their partners, and room for sentinels.
EOS, FIRST_WORD, FIRST_PARTNER = 0, 1, 1 + WORDS
FIRST_SENTINEL = FIRST_PARTNER + WORDS
VOCABULARY = FIRST_SENTINEL + 6
LENGTH = 2 * PAIRS + 1


#: For the records.
SIZES = {"steps": STEPS, "rows a step": ROWS, "row length": LENGTH}
#: Texts that are cut and restored, tokens of each, and how often each is cut.
TEXTS, LONGEST, CUTS = 200, 400, 5


def rows_of(count: int, seed: int) -> Tensor:
    """Return `(count, LENGTH)` rows, each closed by the end-of-text token."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (count, PAIRS), generator=draw)
    partners = torch.randperm(WORDS, generator=torch.Generator().manual_seed(12345))
    pairs = torch.stack((FIRST_WORD + words, FIRST_PARTNER + partners[words]), 2).flatten(1)
    return torch.cat((pairs, torch.full((count, 1), EOS)), 1)


def entropy() -> float:
    """Return the entropy of a row in nats per predicted token; the first token is not predicted."""
    return (PAIRS - 1) * math.log(WORDS) / (LENGTH - 1)


def small_model(seed: int) -> PreTrainedModel:
    """Build the model with random weights."""
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    return small_training.small_model(seed, VOCABULARY, context=32, **special)


def collate(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Stack rows; every token is a label."""
    batch = small_training.all_labels(rows)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def train(objective: Objective | None, seed: int, steps: int = STEPS) -> PreTrainedModel:
    """Train `small_model(seed)` on fresh rows; None is next-token prediction."""
    model, rows = small_model(seed), rows_of(steps * ROWS, seed + 1000)
    options: dict[str, Any] = {"collator": collate, "lr_scheduler_type": "cosine"}
    return small_training.train(model, objective, rows, steps=steps, batch=ROWS, rate=3e-3, seed=seed, **options)


@functools.cache
def plain(seed: int) -> PreTrainedModel:
    """Return the model that was trained on next tokens; the claims of a method share it."""
    return train(None, seed)


@torch.no_grad()
def left_to_right_loss(model: PreTrainedModel, without: Sequence[int] = ()) -> float:
    """Return the next-token loss in nats on unseen rows in their natural order.

    Args:
        model: a causal LM.
        without: tokens that are left out of the vocabulary, as generation leaves out sentinels.
    """
    rows = rows_of(TEST_ROWS, seed=7)
    logits = model(rows).logits[:, :-1]
    logits[..., list(without)] = -math.inf
    return float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def holes_of(row: list[int], count: int) -> list[list[int]]:
    """Cut the first halves of every second pair out of a row, `count` in all; return what is around them."""
    cuts = places_of(count)
    starts, stops = [0, *[cut + 1 for cut in cuts]], [*cuts, LENGTH - 1]  # the method adds the end of the text
    return [row[start:stop] for start, stop in zip(starts, stops, strict=True)]


def places_of(count: int) -> list[int]:
    """Return where the holes are."""
    return [4 * hole + 2 for hole in range(count)]


def share_filled(model: PreTrainedModel, method: Infilling, holes: int) -> float:
    """Return the share of held-out first halves that greedy infilling finds, no more and no less."""
    rows = rows_of(TEST_ROWS, seed=7).tolist()
    filled = fill_holes(model, None, [holes_of(row, holes) for row in rows], method, max_new_tokens=4, do_sample=False)
    hits = [
        span == [row[place]]
        for row, found in zip(rows, filled, strict=True)
        for place, span in zip(places_of(holes), found.tokens, strict=True)
    ]
    return sum(hits) / len(hits)


@torch.no_grad()
def share_guessed(model: PreTrainedModel, holes: int) -> float:
    """Return the share of the same tokens that a model finds left to right, from what stands before."""
    rows = rows_of(TEST_ROWS, seed=7)
    found = model(rows).logits.argmax(-1)
    places = torch.tensor(places_of(holes))
    return float((found[:, places - 1] == rows[:, places]).float().mean())


def difference(ours: Sequence[float], theirs: Sequence[float], details: Mapping[str, Any]) -> Measurement:
    """Return the mean difference over the seeds, with its lowest and highest.

    Args:
        ours: a figure for each seed.
        theirs: likewise.
        details: further figures for the record; lists are rounded.

    Example:
        >>> found = difference([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], {})
        >>> found.value, found.spread
        (1.0, (0.0, 2.0))
    """
    gaps = [one - other for one, other in zip(ours, theirs, strict=True)]
    shown = {
        name: [round(item, 4) for item in value] if isinstance(value, list) else value
        for name, value in details.items()
    }
    return Measurement(
        statistics.fmean(gaps),
        spread=(min(gaps), max(gaps)),
        spread_of=f"lowest and highest of {len(SEEDS)} seeds",
        seeds=SEEDS,
        details=shown,
    )


def losses_of_moved_spans(name: str, trained: Callable[[int], PreTrainedModel]) -> Measurement:
    """Compare losses on unseen rows in their natural order, of all tokens but the masks, for each seed.

    Args:
        name: of the method, whose masks are the first two sentinels.
        trained: returns the model of a seed.
    """
    masks = [FIRST_SENTINEL, FIRST_SENTINEL + 1]
    ours = [left_to_right_loss(trained(seed), without=masks) for seed in SEEDS]
    theirs = [left_to_right_loss(plain(seed), without=masks) for seed in SEEDS]
    with_masks = [left_to_right_loss(trained(seed)) for seed in SEEDS]
    return difference(
        ours,
        theirs,
        {
            f"{name}, held-out loss without masks": ours,
            f"{name}, held-out loss with masks": with_masks,
            "next-token, held-out loss without masks": theirs,
            "entropy of the rows": round(entropy(), 4),
            **SIZES,
        },
    )


def shares_of_moved_spans(
    name: str, trained: Callable[[int], PreTrainedModel], method: Infilling, holes: int
) -> Measurement:
    """Compare the shares of tokens found in places of a row: with both sides, and left to right, for each seed.

    Args:
        name: of the method.
        trained: returns the model of a seed.
        method: fills.
        holes: places in a row.
    """
    ours = [share_filled(trained(seed), method, holes) for seed in SEEDS]
    guessed = [share_guessed(plain(seed), holes) for seed in SEEDS]
    shown = {name: ours, "next-token, prefix only": guessed, "chance": 1 / WORDS, "gaps a row": holes}
    return difference(ours, guessed, shown)


def distance(objective: Objective) -> Measurement:
    """Return the largest difference between weights after 20 steps with an objective and without."""
    ours, plain_ = train(objective, 0, 20), train(None, 0, 20)
    pairs = zip(ours.state_dict().values(), plain_.state_dict().values(), strict=True)
    return Measurement(max(float((left - right).abs().max()) for left, right in pairs), seeds=(0,))


def restored(method: Infilling, draw: random.Random) -> Measurement:
    """Cut held-out source code at characters, and count texts that do not come back exactly.

    Args:
        method: rewrites every text; tokens that code hardly holds serve as its sentinels.
        draw: random numbers.
    """
    tokenizer = load()[1]
    method.resolve(tokenizer, None)
    wrong = count = retokenised = 0
    for part in texts(tokenizer, method):
        text = tokenizer.decode(part)
        for _ in range(CUTS):
            back = method.restore(method.rewrite(Document(part, part), draw).tokens)
            wrong += tokenizer.decode(back).removesuffix(tokenizer.eos_token) != text
            retokenised += back != part
            count += 1
    return Measurement(
        wrong, details={"cuts": count, "of these within a token": retokenised, "tokens of each text": LONGEST}
    )


def texts(tokenizer: Any, method: Infilling) -> list[list[int]]:
    """Return runs of tokens of held-out source code, without the sentinels."""
    found: list[list[int]] = []
    for source in sources(held_out=True):
        ids = tokenizer(source.text, verbose=False)["input_ids"]
        ids = [token for token in ids if token not in method.sentinels]
        found += [ids[start : start + LONGEST] for start in range(0, len(ids) - LONGEST, LONGEST)]
        if len(found) >= TEXTS:
            break
    return found[:TEXTS]

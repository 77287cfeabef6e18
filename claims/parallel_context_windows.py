"""Claim checks of parallel context windows (arXiv:2212.10947, 2305.15262) with the embedded target.

The context is the text of a held-out file before a place in it, cut into windows; the query is the text
right before that place, and what follows is predicted.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from hf_ext.attention import AttentionStructure, masks_for
from hf_ext.claims import held_out
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.demo.corpus import sources
from hf_ext.generation.parallel_context_windows import ParallelContextWindows
from hf_ext.generation.parallel_ensemble import ParallelEnsemble
from hf_ext.verify import Claim, Measurement, Threshold

DATA = "Places in held-out Python standard library modules, with the text before them"
WINDOWS, WINDOW, QUERY, TARGET, PLACES = 4, 96, 48, 24, 120


@functools.cache
def places(count: int = PLACES) -> torch.Tensor:
    """Return `(count, tokens)` ids: windows, query and what follows, from as many places of held-out files."""
    tokenizer = held_out.load()[1]
    length = WINDOWS * WINDOW + QUERY + TARGET
    found = []
    for source in sources(held_out=True):
        if "/" not in source.name:
            ids = tokenizer(source.text, verbose=False)["input_ids"]
            found += [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    if len(found) < count:
        raise ValueError(f"{len(found)} places were found, {count} were asked for")
    return torch.tensor([found[i * len(found) // count] for i in range(count)])


def segments_of(ids: torch.Tensor, windows: int) -> torch.Tensor:
    """Return the segments of that many windows of equal length before the query, the target being left out."""
    columns = torch.arange(ids.shape[1]).expand(ids.shape)
    width = WINDOWS * WINDOW // windows
    return torch.where(columns < WINDOWS * WINDOW, columns // width + 1, 0)


@torch.no_grad()
def target_laws(ids: torch.Tensor, structure: AttentionStructure) -> torch.Tensor:
    """Return `(rows, TARGET, vocabulary)` probabilities of the tokens that follow the query."""
    model = held_out.load()[0]
    out = model(
        ids, attention_mask=masks_for(model, structure), position_ids=structure.queries.position.long(), use_cache=False
    )
    return out.logits[:, -TARGET - 1 : -1].softmax(-1)


def in_parallel(ids: torch.Tensor) -> torch.Tensor:
    """Windows side by side."""
    return target_laws(ids, AttentionStructure.causal(torch.ones_like(ids)).segments(segments_of(ids, WINDOWS)))


def in_a_row(ids: torch.Tensor) -> torch.Tensor:
    """Plainly, one window after another."""
    return target_laws(ids, AttentionStructure.causal(torch.ones_like(ids)))


def as_ensemble(ids: torch.Tensor) -> torch.Tensor:
    """Every window by itself with the query, their laws mixed equally."""
    segments = segments_of(ids, WINDOWS)[0]
    each = [in_a_row(ids[:, (segments == 0) | (segments == number)]) for number in range(1, WINDOWS + 1)]
    return torch.stack(each).mean(0)


def without(ids: torch.Tensor) -> torch.Tensor:
    """The query alone."""
    return in_a_row(ids[:, WINDOWS * WINDOW :])


@functools.cache
def losses(read: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    """Return each place's mean loss in nats per token."""
    ids = places()
    laws = torch.cat([read(part) for part in ids.split(8)])
    return (-laws.gather(-1, ids[:, -TARGET:, None])[..., 0].log()).mean(-1).tolist()


def next_law(
    strategy: ParallelContextWindows | ParallelEnsemble | None, ids: torch.Tensor, segments: torch.Tensor | None
) -> torch.Tensor:
    """Return the probabilities of the next token through `generate`."""
    model = held_out.load()[0]
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    if strategy is None:
        return model.generate(ids, **settings).logits[0].softmax(-1)
    return strategy.generate(model, ids, segment_ids=segments, **settings).logits[0].softmax(-1)


def one_window() -> Measurement:
    """Compare with the plain model where all of the context is one window."""
    ids = places()[:8, :-TARGET]
    plain = next_law(None, ids, None)
    found = {
        name: float((next_law(method(), ids, segments_of(ids, 1)) - plain).abs().max())
        for name, method in (("windows", ParallelContextWindows), ("ensemble", ParallelEnsemble))
    }
    return Measurement(max(found.values()), details={**found, "places": len(ids)})


def order() -> Measurement:
    """Compare the laws over all orders of the windows."""
    ids = places()[:2, :-TARGET]
    segments = segments_of(ids, WINDOWS)
    worst: dict[str, float] = {}
    for name, method in (("windows", ParallelContextWindows), ("ensemble", ParallelEnsemble), ("plain", None)):
        laws = []
        for permutation in itertools.permutations(range(WINDOWS)):
            parts = [ids[:, number * WINDOW : (number + 1) * WINDOW] for number in permutation]
            moved = torch.cat([*parts, ids[:, WINDOWS * WINDOW :]], dim=1)
            laws.append(next_law(method and method(), moved, segments))
        worst[name] = max(float((law - laws[0]).abs().max()) for law in laws)
    return Measurement(max(worst["windows"], worst["ensemble"]), details={**worst, "orders": 24, "places": len(ids)})


def ensemble_gain() -> Measurement:
    """Compare the loss of what follows the query, place by place."""
    windows, ensemble = losses(in_parallel), losses(as_ensemble)
    gain = [a - b for a, b in zip(windows, ensemble, strict=True)]
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {PLACES} places",
        details={
            "loss with parallel windows": mean(windows),
            "loss of the ensemble": mean(ensemble),
            "loss with the windows one after another": mean(losses(in_a_row)),
            "loss without the windows": mean(losses(without)),
            "windows": WINDOWS, "tokens a window": WINDOW, "tokens predicted": TARGET,
        },
    )  # fmt: skip


CLAIMS = (
    Claim(
        name="one-window",
        paper="(derived) With a single window, both methods are the plain model.",
        measures="largest difference of a next-token probability from plain prompting, parallel windows and ensemble",
        threshold=Threshold("<=", 1e-5),
        check=one_window,
        unit="probability",
        seconds=10,
        data=DATA,
    ),
    Claim(
        name="order",
        paper="(derived) The order of the windows does not matter.",
        measures=f"largest difference of a next-token probability over all orders of {WINDOWS} windows, parallel "
        "windows and ensemble",
        threshold=Threshold("<=", 1e-5),
        check=order,
        unit="probability",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="ensemble",
        paper="A weighted sum of the predictions of single windows is as good as parallel windows (arXiv:2305.15262).",
        measures="loss of the text after the query with parallel windows less that of the ensemble",
        threshold=Threshold(">=", 0),
        check=ensemble_gain,
        unit="nats per token",
        seconds=40,
        data=DATA,
    ),
)

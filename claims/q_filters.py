"""Claim checks of Q-Filters (arXiv:2503.02812) with the embedded model on Python code.

A text is read with a compressed cache, then what follows it is predicted. Retrieval is measured where the text
says it: on tokens that repeat a pair of tokens which stood far back in what was read, and nowhere nearer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from hf_ext.attention.statistics import collect
from hf_ext.cache import CachePolicy, CompressedCache, Filters, KeyDiff, Knorm, QFilters, StreamingLLM
from hf_ext.claims.held_out import bootstrap, load, mean
from hf_ext.claims.kvmerger import DATA, PREDICTED, READ, texts
from hf_ext.demo.corpus import sources
from hf_ext.verify import Claim, Measurement, Threshold

BUDGET = 0.25
#: What counts as far: the tokens before these last ones of what was read, which is more than StreamingLLM keeps.
NEAR = 96
#: Texts that filters are fitted on, tokens of each, and texts for correlations.
FITTED, LENGTH, CORRELATED = 32, 384, 32
#: Queries that a key must have been seen by, so that its mean attention is one.
QUERIES = 64
SEEDS = (0, 1, 2)


@functools.cache
def filters() -> Filters:
    """Return the filters of the embedded model, fitted on modules that it was trained on."""
    model, tokenizer = load()
    files = list(sources(held_out=False))
    chosen = [files[i * len(files) // FITTED].text for i in range(FITTED)]
    return QFilters.fit(model, chosen, tokenizer, max_length=LENGTH)


def by_chance(seed: int) -> CachePolicy:
    """Return the policy with directions drawn by chance."""
    drawn = torch.randn(filters().directions.shape, generator=torch.Generator().manual_seed(seed))
    return QFilters(filters=drawn, budget=BUDGET)


POLICIES: dict[str, Callable[[], CachePolicy] | None] = {
    "full cache": None,
    "Q-Filters": lambda: QFilters(filters=filters(), budget=BUDGET),
    "Knorm": lambda: Knorm(budget=BUDGET),
    "Knorm with the window of Q-Filters": lambda: Knorm(budget=BUDGET, window=QFilters(filters=filters()).window),
    "StreamingLLM": lambda: StreamingLLM(budget=BUDGET),
    "KeyDiff": lambda: KeyDiff(budget=BUDGET),
    "opposite directions": lambda: QFilters(filters=-filters().directions, budget=BUDGET),
    **{f"random directions {seed}": functools.partial(by_chance, seed) for seed in SEEDS},
}


@functools.cache
@torch.no_grad()
def losses(name: str) -> Tensor:
    """Return `(texts, predicted tokens)` nats after a prompt that a policy has compressed."""
    model, found, make = load()[0], [], POLICIES[name]
    model.set_attn_implementation("hf_ext")
    for ids in texts().split(32):
        cache: Cache = DynamicCache(config=model.config) if make is None else CompressedCache(model.config, make())
        model(ids[:, :READ], past_key_values=cache, logits_to_keep=1)
        logits = model(ids[:, READ:-1], past_key_values=cache).logits
        found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, READ + 1 :], reduction="none"))
    return torch.cat(found)


@functools.cache
def repeats() -> Tensor:
    """Return `(texts, predicted tokens)` bool: the token and the one before it stood together far back, and only there.

    The first time only: what is predicted after it can be read off nearer by.
    """
    found = torch.zeros(len(texts()), PREDICTED - 1, dtype=torch.bool)
    for number, row in enumerate(texts().tolist()):
        pairs = list(itertools.pairwise(row))
        far, near = set(pairs[: READ - NEAR - 1]), set(pairs[READ - NEAR - 1 : READ])
        for column in range(READ, READ + PREDICTED - 1):
            pair = pairs[column]
            found[number, column - READ] = pair in far and pair not in near
            near.add(pair)
    return found


def compared(other: str, where: Tensor) -> Measurement:
    """Measure how much less is lost than with another method on some of the tokens, text by text."""

    def per_text(name: str) -> list[float]:
        if name == "random directions":
            return [mean(row) for row in zip(*(per_text(f"{name} {seed}") for seed in SEEDS), strict=True)]
        return [float(row[mask].mean()) for row, mask in zip(losses(name), where, strict=True) if mask.any()]

    mine, theirs = per_text("Q-Filters"), per_text(other)
    gains = [b - a for a, b in zip(mine, theirs, strict=True)]
    names = ("Q-Filters", other, "full cache")
    return Measurement(
        mean(gains),
        spread=bootstrap(gains),
        spread_of=f"95 % bootstrap interval over {len(gains)} texts",
        seeds=SEEDS if other == "random directions" else (),
        details={
            "tokens": int(where.sum()),
            "budget": BUDGET,
            **{f"nats per token, {name}": round(mean(per_text(name)), 4) for name in names},
        },
    )


def everywhere() -> Tensor:
    """Return `(texts, predicted tokens)` True."""
    return torch.ones_like(repeats())


def over_knorm() -> Measurement:
    """Compare retrieval with Knorm, and with Knorm that has the same window."""
    found = compared("Knorm", repeats())
    windowed = compared("Knorm with the window of Q-Filters", repeats())
    more = {name: value for name, value in windowed.details.items() if "window" in name}
    return Measurement(found.value, found.spread, found.spread_of, details={**found.details, **more})


def over_streaming() -> Measurement:
    """Compare retrieval with StreamingLLM; also say what KeyDiff, another policy that sees keys only, loses."""
    found = compared("StreamingLLM", repeats())
    name = "nats per token, KeyDiff"
    details = {**found.details, name: compared("KeyDiff", repeats()).details[name]}
    return Measurement(found.value, found.spread, found.spread_of, details=details)


def chance() -> Measurement:
    """Compare retrieval with directions drawn by chance, and with the opposite ones."""
    found = compared("random directions", repeats())
    name = "nats per token, opposite directions"
    details = {**found.details, name: compared("opposite directions", repeats()).details[name]}
    return Measurement(found.value, found.spread, found.spread_of, seeds=SEEDS, details=details)


def _ranks(values: Tensor) -> Tensor:
    ranks = values.argsort(-1).argsort(-1).double()
    return ranks - ranks.mean(-1, keepdim=True)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return the rank correlations over the last dimension.

    Example:
        >>> round(float(spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3]))), 6)
        1.0
    """
    a, b = _ranks(a), _ranks(b)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


@torch.no_grad()
def correlation() -> Measurement:
    """Correlate scores of keys with the mean attention they get from all queries that see them."""
    model = load()[0]
    model.set_attn_implementation("hf_ext")
    ours, norms = [], []
    for ids in texts()[:: len(texts()) // CORRELATED]:
        cache, n = DynamicCache(config=model.config), len(ids)
        with collect(model, lse=False) as statistics:
            model(ids[None], past_key_values=cache, logits_to_keep=1)
        of_heads, of_norms = [], []
        for number, layer in enumerate(cache.layers):
            sums, keys = statistics[number].column_sums, layer.keys
            assert sums is not None
            received = (sums[0] / torch.arange(n, 0, -1))[:, : n - QUERIES]
            scores = torch.einsum("hnd,hd->hn", keys[0], filters().directions[number])[:, : n - QUERIES]
            of_heads.append(spearman(scores, received))
            of_norms.append(spearman(-keys[0].norm(dim=-1)[:, : n - QUERIES], received))
        ours.append(torch.stack(of_heads))
        norms.append(float(torch.stack(of_norms).mean()))
    per_text = [float(found.mean()) for found in ours]
    per_head = torch.stack(ours).mean(0)
    return Measurement(
        mean(per_text),
        spread=bootstrap(per_text),
        spread_of=f"95 % bootstrap interval over {len(per_text)} texts",
        details={
            "heads": per_head.numel(),
            "heads with a positive correlation": int((per_head > 0).sum()),
            "least of a head": round(float(per_head.min()), 4),
            "greatest of a head": round(float(per_head.max()), 4),
            "correlation of the negative norm, which Knorm scores by": round(mean(norms), 4),
            "tokens fitted on": filters().tokens,
        },
    )


_FAR = "nats per token lost less on tokens that repeat a pair read far back, at 25 % of the cache"

CLAIMS = (
    Claim(
        name="correlation",
        paper="The projection of a key on the main direction of queries says how much attention it gets on average.",
        measures="rank correlation of a key's score with the mean attention it gets, over heads",
        threshold=Threshold(">", 0),
        check=correlation,
        unit="Spearman's rho",
        seconds=25,
        data=DATA,
    ),
    Claim(
        name="retrieval-over-knorm",
        paper="It retrieves more than the norms of keys at the same budget.",
        measures=f"{_FAR} than with Knorm",
        threshold=Threshold(">", 0),
        check=over_knorm,
        unit="nats per token",
        seconds=40,
        data=DATA,
    ),
    Claim(
        name="retrieval-over-streaming-llm",
        paper="It retrieves more than StreamingLLM at the same budget.",
        measures=f"{_FAR} than with StreamingLLM",
        threshold=Threshold(">", 0),
        check=over_streaming,
        unit="nats per token",
        seconds=40,
        data=DATA,
    ),
    Claim(
        name="perplexity-over-streaming-llm",
        paper="Perplexity suffers up to 65 % less than with StreamingLLM.",
        measures="nats per token lost less on all tokens than with StreamingLLM, at 25 % of the cache",
        threshold=Threshold(">", 0),
        check=lambda: compared("StreamingLLM", everywhere()),
        unit="nats per token",
        seconds=30,
        data=DATA,
    ),
    Claim(
        name="over-chance",
        paper="(control) The direction matters: one drawn by chance retrieves less.",
        measures=f"{_FAR} than with random directions",
        threshold=Threshold(">", 0),
        check=chance,
        unit="nats per token",
        seconds=60,
        data=DATA,
    ),
)

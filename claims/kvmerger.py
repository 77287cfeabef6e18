"""Claim checks of KVMerger (arXiv:2407.08454) with the embedded model on Python code.

A text is read with a compressed cache, then what follows it is predicted; the text holds nothing twice, so that what is
lost hurts the more. Merging is held against dropping, at the same budget: against H2O, which sees the same attention,
and against policies that see none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from transformers import Cache, DynamicCache

from hf_ext.cache import H2O, CachePolicy, CompressedCache, Knorm, KVMerger, StreamingLLM
from hf_ext.claims.held_out import bootstrap, load, mean
from hf_ext.demo.corpus import sources
from hf_ext.testing import tiny_models
from hf_ext.verify import Claim, Measurement, Threshold

DATA = "Python standard library source, held-out modules"
#: Tokens that are read and compressed, tokens that are predicted after them, and texts.
READ, PREDICTED, TEXTS = 320, 64, 64
BUDGETS = (0.5, 0.35)
SINKS = 4
DROPPING: dict[str, Callable[[float], CachePolicy]] = {
    "H2O": lambda budget: H2O(budget=budget, sinks=SINKS),
    "StreamingLLM": lambda budget: StreamingLLM(budget=budget, sinks=SINKS),
    "Knorm": lambda budget: Knorm(budget=budget, sinks=SINKS),
}


@functools.cache
def texts() -> torch.Tensor:
    """Return `(TEXTS, READ + PREDICTED)` tokens from the middle of held-out modules, spread evenly over them."""
    tokenizer = load()[1]
    length = READ + PREDICTED
    files = [tokenizer(s.text, verbose=False)["input_ids"] for s in sources(held_out=True) if "/" not in s.name]
    rows = [ids[start : start + length] for ids in files for start in range(0, len(ids) - length, length)]
    return torch.tensor([rows[i * len(rows) // TEXTS] for i in range(TEXTS)])


@torch.no_grad()
def nats(policy: CachePolicy | None) -> list[float]:
    """Return for each text the nats per token of what follows, read after a prompt that is compressed.

    Args:
        policy: of the cache; None for a full one.
    """
    model = load()[0]
    model.set_attn_implementation("hf_ext")
    found: list[float] = []
    for ids in texts().split(32):
        cache: Cache = DynamicCache(config=model.config) if policy is None else CompressedCache(model.config, policy)
        model(ids[:, :READ], past_key_values=cache, logits_to_keep=1)
        logits = model(ids[:, READ:-1], past_key_values=cache).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, READ + 1 :], reduction="none")
        found += losses.mean(1).tolist()
    return found


@functools.cache
def loss(name: str, budget: float) -> tuple[float, ...]:
    """Return the nats per token of every text with a method at a budget."""
    if name == "full cache":
        return tuple(nats(None))
    merging = {"KVMerger": {}, "KVMerger without its bias": {"biased": False}, "merging all": {"least": -1.0}}
    if name in merging:
        return tuple(nats(KVMerger(budget=budget, sinks=SINKS, **merging[name])))  # type: ignore[arg-type]
    return tuple(nats(DROPPING[name](budget)))


def saved(other: str, budget: float, own: str = "KVMerger") -> Measurement:
    """Measure how much less is lost than with another method."""
    mine, theirs, full = loss(own, budget), loss(other, budget), loss("full cache", 1.0)
    gains = [b - a for a, b in zip(mine, theirs, strict=True)]
    details = {
        f"nats per token, {name}": round(mean(values), 4)
        for name, values in ((own, mine), (other, theirs), ("full cache", full))
    }
    return Measurement(mean(gains), bootstrap(gains), f"95 % bootstrap interval over {TEXTS} texts", details=details)


def against_best(budget: float) -> Measurement:
    """Measure it against the best of all that drop."""
    return saved(min(DROPPING, key=lambda name: mean(loss(name, budget))), budget)


@torch.no_grad()
def equal_keys() -> Measurement:
    """Merge runs of equal tokens in a model of one layer without positions, where their keys are equal."""
    model = tiny_models.build("gpt2", n_layer=1)
    model.transformer.wpe.weight.zero_()
    model.set_attn_implementation("hf_ext")
    runs: Sequence[tuple[int, int]] = ((5, 9), (9, 7), (7, 12), (8, 4), (11, 8), (6, 8))
    ids = torch.tensor([[token for token, count in runs for _ in range(count)]])
    policy = KVMerger(budget=len(runs), interval=1, heavy=0.0, recent=0.0, sinks=0, least=-1.0)
    ours, full = CompressedCache(model.config, policy), DynamicCache(config=model.config)
    worst = 0.0
    for part in ids.split((40, *[1] * 8), dim=1):
        gap = model(part, past_key_values=ours).logits - model(part, past_key_values=full).logits
        worst = max(worst, float(gap.abs().max()))
    details = {"tokens": ids.shape[1], "entries": max(ours.held())}
    return Measurement(worst, details=details)


def held() -> Measurement:
    """Compare what is held with the budget."""
    model = load()[0]
    model.set_attn_implementation("hf_ext")
    worst = 0.0
    for budget in BUDGETS:
        cache = CompressedCache(model.config, KVMerger(budget=budget))
        with torch.no_grad():
            model(texts()[:1, :READ], past_key_values=cache)
        worst = max(worst, max(cache.held()) / (budget * READ))
    return Measurement(worst)


def _over(budget: float) -> list[Claim]:
    percent = f"{budget:.0%}".replace("%", " %")
    return [
        Claim(
            name=f"over-h2o-{budget:g}",
            paper=f"Merging beats evicting by H2O at a cache budget of {percent}.",
            measures=f"nats per token after a compressed text with H2O less those with KVMerger, both at {percent}",
            threshold=Threshold(">", 0),
            check=functools.partial(saved, "H2O", budget),
            unit="nats per token",
            seconds=30,
            data=DATA,
        ),
        Claim(
            name=f"over-best-{budget:g}",
            paper=f"Merging beats evicting at a cache budget of {percent}.",
            measures=f"the same against the best of {', '.join(DROPPING)}",
            threshold=Threshold(">", 0),
            check=functools.partial(against_best, budget),
            unit="nats per token",
            seconds=40,
            data=DATA,
        ),
    ]


CLAIMS = (
    *(claim for budget in BUDGETS for claim in _over(budget)),
    Claim(
        name="merging-all",
        paper="Merging beats evicting by H2O, here where nothing at all is dropped (least=-1.0), at 50 %.",
        measures="nats per token after a compressed text with H2O less those where all that is too much is merged",
        threshold=Threshold(">", 0),
        check=functools.partial(saved, "H2O", BUDGETS[0], "merging all"),
        unit="nats per token",
        seconds=30,
        data=DATA,
    ),
    Claim(
        name="bias-helps",
        paper="(Ours) An entry of several tokens should count as many.",
        measures="nats per token without the bias less those with it, at 35 %",
        threshold=Threshold(">", 0),
        check=functools.partial(saved, "KVMerger without its bias", BUDGETS[-1]),
        unit="nats per token",
        seconds=30,
        data=DATA,
    ),
    Claim(
        name="equal-keys",
        paper="(Ours) Merging equal keys loses nothing.",
        measures="largest difference of logits to a full cache, where runs of equal keys are merged",
        threshold=Threshold("<=", 1e-5),
        check=equal_keys,
        unit="logit",
        seconds=2,
    ),
    Claim(
        name="budget",
        paper="The cache keeps to its budget.",
        measures="entries held by any head after a prompt, over the budget",
        threshold=Threshold("<=", 1),
        check=held,
        seconds=3,
        data=DATA,
    ),
)

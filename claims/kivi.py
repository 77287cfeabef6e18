"""Claim checks of KIVI (arXiv:2402.02750) on the embedded target, on source it never saw."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from hf_ext.cache import KIVI, CachePolicy, CompressedCache, Knorm
from hf_ext.claims import held_out
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.demo.corpus import sources
from hf_ext.kernels.packing import dequantise_keys, dequantise_values, quantise_keys, quantise_values
from hf_ext.verify import Claim, Measurement, Threshold

DATA = "Source of held-out Python standard library modules"
#: Texts, tokens of each that are read at once, and tokens after them that are scored over the packed ones.
TEXTS, READ, SCORED = 16, 384, 96
GROUP, RESIDUAL = 32, 64
#: For keys with outliers: tokens, channels, how much larger the large channels are.
TOKENS, WIDTH, LARGE = 512, 64, 30.0
SEEDS = tuple(range(10))


@functools.cache
def texts() -> Tensor:
    """Return `(TEXTS, READ + SCORED)` ids from the beginnings of as many modules."""
    tokenizer, rows = held_out.load()[1], []
    for source in sources(held_out=True):
        ids = tokenizer(source.text[: 8 * (READ + SCORED)], verbose=False)["input_ids"]
        if "/" not in source.name and len(ids) >= READ + SCORED:
            rows.append(ids[: READ + SCORED])
        if len(rows) == TEXTS:
            break
    return torch.tensor(rows)


@functools.cache
@torch.no_grad()
def losses(bits: int) -> list[float]:
    """Return the nats per token of every text when its beginning is held in so many bits; 0 for full precision."""
    model, implementation = held_out.load()[0], held_out.load()[0].config._attn_implementation
    policy: CachePolicy = Knorm(budget=1.0)
    if bits:
        policy = KIVI(bits=bits, group=GROUP, channels=GROUP, residual=RESIDUAL, guard=False)
    model.set_attn_implementation("hf_ext")
    try:
        found = []
        for ids in texts().split(8):
            cache = CompressedCache(model.config, policy)
            model(ids[:, :READ], past_key_values=cache)
            logits = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(READ, READ + SCORED - 1)]
            surprise = torch.nn.functional.cross_entropy(
                torch.cat(logits, 1).transpose(1, 2), ids[:, READ + 1 :], reduction="none"
            )
            found += surprise.mean(1).tolist()
    finally:
        model.set_attn_implementation(implementation)
    return found


def loss_of(bits: int) -> Measurement:
    """Compare the loss over packed entries with that over entries in full precision, text by text."""
    gaps = [packed - full for packed, full in zip(losses(bits), losses(0), strict=True)]
    return Measurement(
        mean(gaps),
        spread=bootstrap(gaps),
        spread_of=f"95 % bootstrap interval over {TEXTS} texts",
        details={
            "perplexity": round(math.exp(mean(losses(bits))), 4),
            "perplexity in full precision": round(math.exp(mean(losses(0))), 4),
            "tokens packed before the first one scored": (READ - RESIDUAL) // GROUP * GROUP,
            "tokens scored": TEXTS * (SCORED - 1),
        },
    )


def with_outliers(seed: int) -> tuple[Tensor, Tensor]:
    """Return queries and keys in which two of the channels are large for all tokens."""
    draw = torch.Generator().manual_seed(seed)
    query, keys = torch.randn(1, 1, 64, WIDTH, generator=draw), torch.randn(1, 1, TOKENS, WIDTH, generator=draw)
    keys[..., :2] = keys[..., :2] + LARGE
    return query, keys


def share_of_error(seed: int) -> float:
    """Return the error of scores with 2-bit keys by channel over that with 2-bit keys by token."""
    query, keys = with_outliers(seed)
    back = {
        "channel": dequantise_keys(*quantise_keys(keys, 2, GROUP), bits=2),
        "token": dequantise_values(*quantise_values(keys, 2, GROUP), bits=2),
    }
    errors = {name: float((query @ (keys - other).mT).square().mean().sqrt()) for name, other in back.items()}
    return errors["channel"] / errors["token"]


def channels_beat_tokens() -> Measurement:
    """Compare the two ways to quantise keys that have channels of outliers."""
    ratios = [share_of_error(seed) for seed in SEEDS]
    return Measurement(
        mean(ratios), (min(ratios), max(ratios)), f"lowest and highest of {len(SEEDS)} seeds", SEEDS,
        {"tokens": TOKENS, "channels": WIDTH, "large channels": 2, "their mean": LARGE, "group": GROUP},
    )  # fmt: skip


@torch.no_grad()
def memory() -> Measurement:
    """Compare bytes held after a text of 4,096 tokens with those of a full cache, for heads of width 64."""
    from hf_ext.testing import tiny_models

    model = tiny_models.build("llama", head_dim=64, max_position_embeddings=4096).to(torch.bfloat16)
    model.set_attn_implementation("hf_ext")
    ids = tiny_models.prompts((4096,))[0]
    held = {}
    for bits in (0, 2, 4, 8):
        policy: CachePolicy = KIVI(bits=bits, guard=False) if bits else Knorm(budget=1.0)
        cache = CompressedCache(model.config, policy)
        for part in ids.split(1024, dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
        held[bits] = cache.resident_bytes()
    full = 2 * 2 * 2 * ids.shape[1] * 64 * 2
    return Measurement(
        held[2] / full,
        details={
            **{f"share at {bits} bits": round(held[bits] / full, 4) for bits in (4, 8)},
            "tokens": ids.shape[1], "bytes of keys and values in bfloat16": full,
        },
    )  # fmt: skip


CLAIMS = (
    Claim(
        name="channels-beat-tokens",
        paper="Keys have channels of outliers, so they must be quantised by channel, not by token (section 3.2).",
        measures=f"error of scores, 2-bit keys by channel over by token, two of {WIDTH} channels around {LARGE:.0f}",
        threshold=Threshold("<=", 0.5),
        check=channels_beat_tokens,
        unit="times",
        seconds=2,
    ),
    Claim(
        name="memory",
        paper="(follows from the layout) 2 bits, scales and a window of 128 tokens take little of what 16 bits do.",
        measures="bytes held at 2 bits over those of keys and values in bfloat16, 4,096 tokens",
        threshold=Threshold("<=", 0.25),
        check=memory,
        unit="times",
        seconds=10,
    ),
    Claim(
        name="eight-bits",
        paper="(not in the paper) 8 bits change next to nothing.",
        measures="loss over entries in 8 bits minus loss over entries in full precision",
        threshold=Threshold("<=", 0.001),
        check=functools.partial(loss_of, 8),
        unit="nats per token",
        seconds=40,
        data=DATA,
    ),
    Claim(
        name="four-bits",
        paper="4 bits maintain accuracy; only fewer do not, if quantised in the wrong direction (section 3.2).",
        measures="loss over entries in 4 bits minus loss over entries in full precision",
        threshold=Threshold("<=", 0.01),
        check=functools.partial(loss_of, 4),
        unit="nats per token",
        seconds=40,
        data=DATA,
    ),
    Claim(
        name="two-bits",
        paper="Models maintain almost the same quality with 2 bits (abstract).",
        measures="loss over entries in 2 bits minus loss over entries in full precision",
        threshold=Threshold("<=", 0.02),
        check=functools.partial(loss_of, 2),
        unit="nats per token",
        seconds=40,
        data=DATA,
    ),
)

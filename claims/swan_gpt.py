"""Claim checks of SWAN-GPT (arXiv:2504.08719): length, cache and conversion.

Twins of 0.2 million parameters, one SWAN-GPT and one Llama, learn the standard library's source byte by byte at
a context of 64 bytes. Bytes rather than tokens, because what is measured needs many steps and no large vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_ext import demo
from hf_ext.demo.corpus import sources
from hf_ext.demo.train import optimizers
from hf_ext.modeling.swan_gpt.configuration_swan_gpt import LOCAL, SwanGPTConfig
from hf_ext.modeling.swan_gpt.modeling_swan_gpt import SwanGPTForCausalLM
from hf_ext.verify import Claim, Measurement, Threshold

CONTEXT, WINDOW = 64, 16
#: Losses are compared where a byte has four to eight contexts before it.
LONG = 8 * CONTEXT
SEEDS = (0, 1, 2)
STEPS, BATCH, LEARNING_RATE = 200, 32, 5e-3
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}
DATA = "Python standard library source, bytes of held-out modules"
SEED_RANGE = f"lowest and highest of {len(SEEDS)} seeds"


@functools.cache
def corpus(held_out: bool) -> torch.Tensor:
    """Return the first megabyte of training modules, or of held-out modules, as one row of bytes."""
    parts: list[str] = []
    for source in sources(held_out=held_out):
        if "/" not in source.name:
            parts.append(source.text)
        if sum(map(len, parts)) > 1_000_000:
            break
    return as_bytes("\0".join(parts))


def as_bytes(text: str) -> torch.Tensor:
    """Return the UTF-8 bytes of `text` as an int64 row.

    Example:
        >>> as_bytes("ab").tolist()
        [97, 98]
    """
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def swan() -> SwanGPTForCausalLM:
    """One global layer and three local ones, untrained."""
    return SwanGPTForCausalLM(SwanGPTConfig(**SHAPE, sliding_window=WINDOW))


def twin() -> LlamaForCausalLM:
    """The same shape with rotary positions and full attention everywhere, untrained."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def train(model: PreTrainedModel, seed: int, steps: int = STEPS) -> PreTrainedModel:
    """Train on windows of `CONTEXT` bytes; with the same seed every model sees the same ones in the same order."""
    data, generator = corpus(held_out=False), torch.Generator().manual_seed(seed)
    optimizer_list = optimizers(model, LEARNING_RATE)
    for step in range(steps):
        share = min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
        starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=generator)
        batch = data[starts[:, None] + torch.arange(CONTEXT)]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizer_list:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model.eval()


@dataclass(frozen=True)
class Losses:
    """Nats per byte on the same bytes, with different amounts of context before them.

    Args:
        short: given what fits into `CONTEXT`, which is what the model was trained on.
        long: given everything, which is four to eight times as much.
    """

    short: float
    long: float

    @property
    def excess(self) -> float:
        """How much the longer context hurts (or, when negative, helps)."""
        return self.long - self.short


@torch.no_grad()
def losses(model: PreTrainedModel, rows: int = 96) -> Losses:
    """Measure both losses on the second halves of `rows` windows of `LONG` held-out bytes."""
    data = corpus(held_out=True)
    windows = data[: len(data) // LONG * LONG].view(-1, LONG)
    windows = windows[:: max(1, len(windows) // rows)][:rows]
    half = CONTEXT // 2
    long = torch.cat([nats(model, batch)[:, LONG // 2 - 1 :] for batch in windows.split(16)])
    # Every half context is scored after the half context before it, so that all bytes are scored once.
    pieces = windows[:, LONG // 2 - half :].unfold(1, CONTEXT, half).reshape(-1, CONTEXT)
    short = torch.cat([nats(model, batch)[:, half - 1 :] for batch in pieces.split(256)])
    return Losses(short=short.mean().item(), long=long.mean().item())


def nats(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the surprise `[batch, length - 1]` at every byte but the first."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@functools.cache
def experiment(seed: int) -> dict[str, Losses]:
    """Train both twins and measure them, SWAN-GPT also with its length scale off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        swan_model = train(swan(), seed)
        torch.manual_seed(seed)
        twin_model = train(twin(), seed)
    measured = {"swan": losses(swan_model), "twin": losses(twin_model)}
    swan_model.config.log_scale_slope = 0.0
    return {**measured, "unscaled": losses(swan_model)}


def over_seeds(values: Sequence[float], **details: object) -> Measurement:
    """Return the mean over seeds with its range."""
    value = sum(values) / len(values)
    return Measurement(value, (min(values), max(values)), SEED_RANGE, SEEDS, details)


def rounded(which: str) -> dict[str, list[float]]:
    """Return both losses of one model for every seed, for the record."""
    runs = [experiment(seed)[which] for seed in SEEDS]
    return {"short": [round(run.short, 4) for run in runs], "long": [round(run.long, 4) for run in runs]}


def stays_flat() -> Measurement:
    """SWAN-GPT's loss beyond the training length against its own within it."""
    return over_seeds([experiment(seed)["swan"].excess for seed in SEEDS], swan=rounded("swan"))


def twin_diverges() -> Measurement:
    """The all-rotary twin's excess loss beyond the training length, over SWAN-GPT's."""
    runs = [experiment(seed) for seed in SEEDS]
    return over_seeds([run["twin"].excess - run["swan"].excess for run in runs], twin=rounded("twin"))


def scale_helps() -> Measurement:
    """What the log-length scale saves beyond the training length."""
    runs = [experiment(seed) for seed in SEEDS]
    return over_seeds([run["unscaled"].long - run["swan"].long for run in runs], unscaled=rounded("unscaled"))


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, tokens: int) -> list[int]:
    """Return the memory that each layer's cache really holds after decoding up to `tokens` tokens.

    Counted are whole storages: a slice of a longer tensor keeps all of it alive.
    """
    ids = corpus(held_out=True)[None, :tokens]
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    cache = model(ids[:, -1:], past_key_values=cache, use_cache=True).past_key_values
    return [sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values)) for layer in cache.layers]


def cache_is_bounded() -> Measurement:
    """Share of the twin's cache that SWAN-GPT's local layers hold, when the context is 16 windows and 64 windows."""
    model, full = swan().eval(), twin().eval()
    local = [i for i, kind in enumerate(model.config.layer_types) if kind == LOCAL]
    per_token = cache_bytes(full, 128)[0] // 128
    held = {n: max(cache_bytes(model, n)[i] for i in local) // per_token for n in (16 * WINDOW, 64 * WINDOW)}
    ours, theirs = sum(cache_bytes(model, 64 * WINDOW)), sum(cache_bytes(full, 64 * WINDOW))
    return Measurement(
        max(held.values()) / WINDOW,
        details={
            "window": WINDOW,
            "tokens held by a local layer after 256 tokens": held[16 * WINDOW],
            "tokens held by a local layer after 1024 tokens": held[64 * WINDOW],
            "bytes of all layers after 1024 tokens": ours,
            "bytes of the twin after 1024 tokens": theirs,
        },
    )


@torch.no_grad()
def conversion_is_exact() -> Measurement:
    """Largest difference of logits between the embedded Llama and its conversion with rotary layers only."""
    llama = AutoModelForCausalLM.from_pretrained(demo.path("target")).eval()
    context = llama.config.max_position_embeddings
    model = SwanGPTForCausalLM.from_llama(llama, global_every=None, sliding_window=context)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(llama.config.vocab_size, (2, context), generator=generator)
    largest = (model(ids).logits - llama(ids).logits).abs().max().item()
    return Measurement(largest, seeds=(0,), details={"tokens": ids.numel(), "vocabulary": llama.config.vocab_size})


CLAIMS = (
    Claim(
        name="flat-beyond-training",
        paper="Strong performance on sequences much longer than those of training, without long-context training.",
        measures=f"loss at 4 to 8 times the training length minus loss on the same bytes within it ({CONTEXT} bytes)",
        threshold=Threshold("<=", 0.05),
        check=stays_flat,
        unit="nats per byte",
        seconds=80,
        data=DATA,
    ),
    Claim(
        name="rotary-twin-diverges",
        paper="Models with rotary positions in every layer fail beyond the length they were trained on.",
        measures="the same difference of an all-rotary twin, minus that of SWAN-GPT",
        threshold=Threshold(">=", 0.5),
        check=twin_diverges,
        unit="nats per byte",
        seconds=80,
        data=DATA,
    ),
    Claim(
        name="log-scale-helps",
        paper="Scaling attention logits with the logarithm of the length at inference makes extrapolation more robust.",
        measures="loss at 4 to 8 times the training length without the scale minus loss with it",
        threshold=None,
        check=scale_helps,
        unit="nats per byte",
        seconds=80,
        data=DATA,
    ),
    Claim(
        name="cache-bounded-by-window",
        paper="Sliding-window layers need a key-value cache of the window only.",
        measures="memory held by a local layer's cache after 1024 tokens, in windows",
        threshold=Threshold("<=", 1),
        check=cache_is_bounded,
        unit="windows",
        seconds=2,
    ),
    Claim(
        name="conversion-exact",
        paper="Pre-trained decoders convert to the architecture (here: with rotary layers only, nothing may change).",
        measures="largest difference of logits between a Llama model and its conversion with rotary layers only",
        threshold=Threshold("==", 0),
        check=conversion_is_exact,
        unit="logit",
        seconds=3,
    ),
)

"""A prompt read twice by one model with two adapters, and the two caches mixed layer by layer.

    columns    prefix | last token of the prompt, and what follows it
               ------------------------------------------------------
    pass 1     causal, adapter "default"          -> keys, values
    pass 2     bidirectional, adapter of its own  -> keys, values
    mix        (1 - share) * pass 1 + share * pass 2, a share for the keys and one for the values of each layer
    pass 3     .......   causal, adapter "default", on the mixed cache

The last token of the prompt predicts the first one of the answer, so it is read in pass 3 already.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from hf_ext import adapter
from hf_ext.attention import AttentionStructure, masks_for

#: What the coefficients are called in the model, and the adapters of both passes.
NAME, CAUSAL, BIDIRECTIONAL = "bitune", "default", "bidirectional"


class CacheMix(nn.Module):
    """Mix what two passes have cached, by a coefficient for the keys and one for the values of each layer.

    The share of the bidirectional pass is `|c| / (|c| + scale)`; coefficients begin at `scale`, half and half.
    A small scale lets the usual learning rates of adapters move the shares.

    Args:
        layers: number of layers that cache something.
        scale: see above.

    Raises:
        ValueError: no layers, or a scale that is not above 0.

    Example:
        >>> mix = CacheMix(2)
        >>> mix.fill(keys=0, values=0.75)
        >>> [[round(share, 4) for share in shares.tolist()] for shares in mix.shares()]
        [[0.0, 0.0], [0.75, 0.75]]
    """

    def __init__(self, layers: int, scale: float = 0.01) -> None:
        super().__init__()
        if layers < 1 or not scale > 0:
            raise ValueError(f"CacheMix needs at least one layer and a scale above 0, got {layers} and {scale}")
        self.scale = scale
        self.keys = nn.Parameter(torch.full((layers,), float(scale)))
        self.values = nn.Parameter(torch.full((layers,), float(scale)))

    def shares(self) -> tuple[Tensor, Tensor]:
        """Return the share of the bidirectional pass in keys and values, `(layers,)` each, in float32 or more."""
        sizes = [c.to(torch.promote_types(c.dtype, torch.float32)).abs() for c in (self.keys, self.values)]
        return sizes[0] / (sizes[0] + self.scale), sizes[1] / (sizes[1] + self.scale)

    @torch.no_grad()
    def fill(self, keys: float, values: float) -> None:
        """Set the shares of all layers. From a share of 0 or 1 no gradient leads away.

        Args:
            keys: share of the bidirectional pass in the keys, from 0 to 1.
            values: likewise in the values.
        """
        for coefficients, share in ((self.keys, keys), (self.values, values)):
            if not 0 <= share <= 1:
                raise ValueError(f"a share must be a number from 0 to 1, got {share!r}")
            # Beside 1e30 the scale is lost to rounding, and the share is exactly 1.
            coefficients.fill_(1e30 if share == 1 else self.scale * share / (1 - share))

    def forward(self, causal: Cache, bidirectional: Cache) -> DynamicCache:
        """Return a cache with the mix of two, computed in float32 or more."""
        mixed, (keys, values) = DynamicCache(), self.shares()
        for number, layers in enumerate(zip(causal.layers, bidirectional.layers, strict=True)):
            held = [adapter.layer_tensors(layer) for layer in layers]
            if held[0] is None or held[1] is None:
                raise ValueError(f"layer {number} caches no keys and values of its own, so there is nothing to mix")
            pairs = zip(held[0][:2], held[1][:2], (keys[number], values[number]), strict=True)
            mixed.update(*(_mixed(first, second, share) for first, second, share in pairs), number)
        return mixed


def _mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    share = share.to(first.device)
    dtype = torch.promote_types(first.dtype, share.dtype)
    return (first.to(dtype) * (1 - share) + second.to(dtype) * share).to(first.dtype)


def mix_of(model: Any, name: str) -> CacheMix:
    """Return the coefficients of a model whose two adapters are ready for use.

    Args:
        model: a transformers model inside of a `BituneModel`.
        name: of the method, for messages.

    Raises:
        ValueError: it has no coefficients or lacks an adapter, or its adapters are merged or disabled.
    """
    layers, mix = adapter_layers(model), getattr(model, NAME, None)
    known = {name for layer in layers for part in layer.adapter_layer_names for name in getattr(layer, part)}
    missing = [name for name in (CAUSAL, BIDIRECTIONAL) if name not in known]
    if mix is None or missing:
        lacks = "no coefficients of the mix" if mix is None else f"no adapter called {missing[0]!r}"
        raise ValueError(
            f"{name} reads prompts with two adapters and mixes what they see, but {type(model).__name__} has {lacks}; "
            "train a BituneModel(model, LoraConfig(...)), or load one with BituneModel.from_pretrained(model, folder)"
        )
    if any(layer.merged or layer.disable_adapters for layer in layers):
        raise ValueError(f"{name} switches between two adapters, but those of the model are merged or disabled")
    return mix


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the layers of a model that PEFT has put adapters on."""
    # Known by what is asked of them, so that a model without adapters needs no PEFT to be told so.
    needed = ("adapter_layer_names", "active_adapters", "set_adapter", "merged", "disable_adapters")
    return [module for module in model.modules() if all(hasattr(module, name) for name in needed)]


@contextlib.contextmanager
def reading_with(model: nn.Module, name: str) -> Iterator[None]:
    """Let one adapter be the active one for a while; what is trainable does not change.

    Args:
        model: a model with adapters.
        name: of the adapter.
    """
    layers = adapter_layers(model)
    before = [list(layer.active_adapters) for layer in layers]
    _activate(layers, [[name]] * len(layers))
    try:
        yield
    finally:
        _activate(layers, before)


def _activate(layers: list[Any], names: list[list[str]]) -> None:
    # PEFT freezes the adapters that are not active, but both of them train.
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer, wanted in zip(layers, names, strict=True):
        layer.set_adapter(wanted)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def read_twice(
    model: PreTrainedModel, mix: CacheMix, ids: Tensor, mask: Tensor, split: int, **kwargs: Any
) -> tuple[ModelOutput | None, ModelOutput]:
    """Read the columns before `split` twice, and those from there on once, causally, on the mix.

    Args:
        model: with both adapters.
        mix: of the two caches.
        ids: `(batch, columns)` int64; the prefixes end at `split`, so their padding is on the left.
        mask: `(batch, columns)` bool, False on padding, which may be on both sides.
        split: number of columns that are read twice; 0 reads plainly.
        **kwargs: further forward arguments; `logits_to_keep` is that of the last pass.

    Returns:
        The output of the causal pass over the prefix, None without one, and that of the last pass, whose
        `past_key_values` hold all columns.
    """
    cache, causal = DynamicCache(), None
    early, spare = dict(kwargs), _without_logits(model)
    if "logits_to_keep" in early:
        early |= spare  # logits of the prefix are wanted by nobody
    if split:
        before = AttentionStructure.causal(mask[:, :split])
        with reading_with(model, CAUSAL):
            causal = _run(model, ids[:, :split], before, DynamicCache(), **early)
        with reading_with(model, BIDIRECTIONAL):
            both_ways = before.spans(mask[:, :split].long())
            other = _run(model, ids[:, :split], both_ways, DynamicCache(), **spare)
        cache = mix(causal.past_key_values, other.past_key_values)
    rest = AttentionStructure.causal(mask).part(split, ids.shape[1])
    with reading_with(model, CAUSAL):
        return causal, _run(model, ids[:, split:], rest, cache, **kwargs)


def _run(
    model: PreTrainedModel, ids: Tensor, structure: AttentionStructure, cache: Cache, **kwargs: Any
) -> ModelOutput:
    """Run one pass. The caches are plain ones, whose layers keep every column: masks hold sliding windows."""
    positions = structure.queries.position.long().expand(len(ids), -1)
    return model(
        ids, attention_mask=masks_for(model, structure), position_ids=positions, past_key_values=cache,
        use_cache=True, return_dict=True, **kwargs,
    )  # fmt: skip


def _without_logits(model: PreTrainedModel) -> dict[str, int]:
    """Return what keeps a model from computing the logits of all columns, if it can be kept from it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

"""A stock causal LM reads rows of vectors and tokens: their states, their logits, and the cache of a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ext import adapter
from hf_ext.cache.soft.layout import Layout, Piece
from hf_ext.cache.soft.positions import check_length, positions_optional
from hf_ext.cache.soft.slots import Slots
from hf_ext.layers import in_evaluation


@dataclass(frozen=True, eq=False)
class Reading:
    """What came of a pass.

    Args:
        states: `(rows, columns, width)`, of the last layer after its norm, which the LM head would read.
        logits: `(rows, columns, vocabulary)`, if they were asked for.
    """

    states: Tensor
    logits: Tensor | None


def check_model(model: Any, name: str) -> None:
    """Refuse a model that cannot read vectors in place of tokens, or that padding changes.

    Args:
        model: a causal LM.
        name: of the method, for messages.

    Raises:
        ValueError: an encoder-decoder, a model without `inputs_embeds`, with states of another width than its
            embeddings, or one that reads a padded row otherwise than alone.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> check_model(tiny_models.build("t5"), "ICAE")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ICAE reads vectors among the tokens of a causal LM, ...
    """
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} reads vectors among the tokens of a causal LM, and {kind} is an encoder-decoder")
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} reads vectors among tokens, and {kind} takes no inputs_embeds")
    with torch.no_grad(), in_evaluation(model):
        weight = model.get_input_embeddings().weight
        vectors = weight[[0, 1, 2, 0]].detach()[None]
        mask = torch.tensor([[False, True, True, True]], device=weight.device)
        padded, alone = Layout([Piece(vectors, mask)]), Layout([Piece(vectors[:, 1:], mask[:, 1:])])
        padded.inputs_embeds = torch.cat([vectors[:, :1], padded.inputs_embeds], dim=1)
        padded.attention_mask = mask.long()
        padded.position_ids = torch.nn.functional.pad(padded.position_ids, (1, 0))
        both = [read(model, layout).states[:, -3:].float() for layout in (padded, alone)]
    if both[0].shape[-1] != vectors.shape[-1]:
        raise ValueError(
            f"{name} feeds last states back as embeddings, and those of {kind} are {both[0].shape[-1]} and "
            f"{vectors.shape[-1]} wide"
        )
    allowed = 1e-2 if weight.dtype in (torch.float32, torch.float64) else 0.25  # rounding of many layers
    if float((both[0] - both[1]).abs().max()) > allowed * float(both[1].abs().max()):
        raise ValueError(f"{name} pads rows on the left, and {kind} reads a padded row otherwise than alone")


def as_mask(ids: Tensor | None, mask: Tensor | None, what: str, empty: bool = False) -> Tensor:
    """Return the mask of real tokens as bool, after checking shapes.

    Args:
        ids: `(rows, columns)` int.
        mask: of the same shape, 0 on padding; none by default.
        what: how messages call the ids.
        empty: whether rows without a token are fine.

    Raises:
        ValueError: shapes that do not fit, or a row without tokens.
    """
    if ids is None or ids.ndim != 2:
        raise ValueError(
            f"{what} must be (rows, columns) of token ids, got {None if ids is None else tuple(ids.shape)}"
        )
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
    if real.shape != ids.shape:
        raise ValueError(f"the mask of {what} has the shape {tuple(real.shape)}, expected {tuple(ids.shape)}")
    if not empty and not bool(real.any(-1).all()):
        row = int((~real.any(-1)).nonzero()[0])
        raise ValueError(f"row {row} of {what} has no token; there is nothing to compress")
    return real


def tokens(model: Any, ids: Tensor, mask: Tensor) -> Piece:
    """Return token ids as a piece of rows."""
    return Piece(model.get_input_embeddings()(ids), mask)


def vectors(model: Any, slots: Slots, counted: bool = True) -> Piece:
    """Return slots as a piece of rows.

    Raises:
        ValueError: they are of another width than the model's embeddings.
    """
    weight = model.get_input_embeddings().weight
    if slots.vectors.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"slots of width {slots.vectors.shape[-1]} were made by another model: the embeddings of "
            f"{type(model).__name__} are {weight.shape[-1]} wide"
        )
    return Piece(slots.vectors.to(weight.device, weight.dtype), slots.mask.to(weight.device), counted)


def same_rows(slots: Slots, ids: Tensor, what: str) -> None:
    """Refuse slots of another number of rows than the tokens.

    Raises:
        ValueError: the numbers differ.
    """
    if len(slots) != len(ids):
        raise ValueError(
            f"there are {len(slots)} rows of slots and {len(ids)} rows of {what}; repeat rows: slots[[0, 0]]"
        )


def read(model: Any, layout: Layout, *, logits: bool = False, cache: Any = None, what: str = "the rows") -> Reading:
    """Run a model on rows.

    Args:
        model: a causal LM, with whatever adapters are active.
        layout: the rows.
        logits: whether logits are wanted beside the last states.
        cache: an empty cache to fill, if any.
        what: how messages call the rows.

    Raises:
        ValueError: more positions than the model's table has.
    """
    check_length(model, int(layout.position_ids.max()) + 1, what)
    inputs = layout.inputs()
    decoder = _decoder(model)
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        del inputs["position_ids"]  # such models count by the mask
    inputs |= {"use_cache": cache is not None, "return_dict": True}
    if cache is not None:
        inputs["past_key_values"] = cache
    with positions_optional(model):
        if not logits:
            return Reading(decoder(**inputs).last_hidden_state, None)
        seen: list[Tensor] = []
        hook = decoder.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
        try:
            out = model(**inputs)
        finally:
            hook.remove()
    return Reading(seen[0], out.logits)


def _decoder(model: Any) -> Any:
    """Return the part of a causal LM that its head reads from."""
    decoder = model.get_decoder()
    if decoder is not model:
        return decoder
    # Some text models that also stand within larger ones, as Llama 4's, say that they are it themselves.
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    if len(parts) != 1:
        raise ValueError(
            f"{type(model).__name__} does not say which part of it gives the states that its head reads: get_decoder() "
            f"returns the model itself, which has {len(parts)} models in it"
        )
    return parts[0]


def cached(model: Any, pieces: Sequence[Piece], cache: Any = None) -> Any:
    """Return a cache of rows, from which stock `generate` goes on.

    Args:
        model: a causal LM.
        pieces: of the rows.
        cache: an empty cache to fill; by default what the model would make itself.
    """
    cache = adapter.empty_cache(model) if cache is None else cache
    read(model, Layout(pieces), cache=cache, what="the slots")
    return cache


def continuing(slots: Slots, ids: Tensor, mask: Tensor | None, cache: Any, counted: bool = True) -> dict[str, Any]:
    """Return the inputs of `generate`, or of a forward pass, for tokens after a cached prefix.

    Args:
        slots: what the cache holds.
        ids: `(rows, columns)`, the tokens that follow.
        mask: of the same shape, 0 on padding.
        cache: what `cached` returned for the slots.
        counted: whether slots count as positions.

    Raises:
        ValueError: other rows than the slots', or padding between slots and tokens in a model with a sliding window,
            which counts columns.
    """
    real = as_mask(ids, mask, "input_ids", empty=True)
    same_rows(slots, ids, "input_ids")
    if not bool(real.all()) and any(adapter.layer_window(layer) for layer in adapter.cache_layers(cache)):
        raise ValueError(
            "with padding between the prefix and the tokens, a sliding window reaches less far: give rows of one "
            "length, or let generate(slots=...) read the slots"
        )
    before = Layout([Piece(slots.vectors, slots.mask)]).attention_mask.to(ids.device)
    start = before.sum(-1, keepdim=True) if counted else 0
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([before, real.long()], dim=1),
        "position_ids": (real.long().cumsum(-1) - 1).clamp_min(0) + start,
        "past_key_values": cache,
    }

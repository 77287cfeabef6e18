"""Attention for which what comes after a token stands at the positions before it."""

# Functions of autograd have no types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_ext.attention.by_hand import attended, probabilities, scores
from hf_ext.attention.intercept import Attended, visible
from hf_ext.attention.rotary import Rotary


class Mirror:
    """Attention for which a token `d` places ahead stands where one `d` places behind would.

    Rotary scores depend on the distance only: q R(j - i) k. Turning query and key to the negative of
    their positions, by minus twice the position, gives q R(i - j) k, which is taken for keys ahead. Rows that
    nothing is denoised in look back only, and go the model's own way.

    Args:
        rotary: how the model turns queries and keys.
        windows: of the layers, None for those that see everything; they hold ahead as they do behind.
    """

    def __init__(self, rotary: Rotary, windows: list[int | None]) -> None:
        self.rotary, self.windows = rotary, windows
        self.positions: Tensor | None = None
        self.farthest: int | None = None
        self._parts: tuple[Tensor, Tensor, Tensor] | None = None

    def begin(self, inputs: dict[str, Any] | None, both_ways: Tensor | None = None) -> None:
        """Learn at which positions the tokens of the next training pass stand.

        Args:
            inputs: the batch; None for a pass without a mirror.
            both_ways: (batch,) bool, the rows in which anything looks ahead; all if None.
        """
        self._parts = None
        if both_ways is not None:
            rows, others = both_ways.nonzero()[:, 0], (~both_ways).nonzero()[:, 0]
            if not len(rows):
                inputs = None
            elif len(others):
                self._parts = rows, others, torch.cat([rows, others]).argsort()
        if inputs is None:
            self.positions = None
            return
        ids, given = inputs["input_ids"], inputs.get("position_ids")
        columns = torch.arange(ids.shape[1], device=ids.device)[None]
        self.positions = columns if given is None else given  # without any, the model numbers the columns
        self.farthest = 2 * ids.shape[1] if given is None else None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any
    ) -> Attended:
        """Attend; see `hf_ext.attention.intercept`. Passes that are no training go through as they are."""
        if self.positions is None or not module.training:
            return plain(module, query, key, value, mask, **call)
        if self._parts is None or not (isinstance(mask, Tensor) and mask.ndim == 4 and len(mask) == len(query)):
            return self._mirrored(module, query, key, value, mask, self.positions, call), None
        rows, others, back = self._parts
        (q, k, v, seen), behind = (
            [part.index_select(0, at) for part in (query, key, value, mask)] for at in (rows, others)
        )
        places = self.positions if len(self.positions) == 1 else self.positions[rows]
        found = self._mirrored(module, q, k, v, seen, places, call), plain(module, *behind, **call)[0]
        return torch.cat(found).index_select(0, back), None

    def _mirrored(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, places: Tensor, call: dict[str, Any]
    ) -> Tensor:
        by = -2 * places[:, None, :]
        turned = [self.rotary.rotate(module.layer_idx, states, by, self.farthest) for states in (query, key)]
        ahead = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        seen, window = visible(mask, query, key), self.windows[module.layer_idx]
        if window is not None:
            place = places[:, None]
            seen = seen & (place[..., None, :] - place[..., None] < window)
        dropout = call.get("dropout") or 0.0
        if dropout or any(call.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
            found = torch.where(ahead, scores(turned[0], turned[1], call), scores(query, key, call))
            return attended(nn.functional.dropout(probabilities(found, seen, call), dropout), value)
        scaling = call.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        states, kind = [query, key, *turned, value], query.device.type
        if torch.is_autocast_enabled(kind):
            states = [part.to(torch.get_autocast_dtype(kind)) for part in states]
        out: Tensor = _TwoScores.apply(*states, ahead, seen, scaling)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2).contiguous()


class _TwoScores(torch.autograd.Function):
    """Attention by other queries and keys for what is ahead: the plain formula, with few matrices of all pairs."""

    @staticmethod
    def forward(ctx: Any, query, key, ahead_query, ahead_key, value, ahead, seen, scaling: float):
        """Return (batch, heads, queries, width)."""
        with torch.autocast(query.device.type, enabled=False):
            found = _pairs(query * scaling, key)
            torch.where(ahead, _pairs(ahead_query * scaling, ahead_key), found, out=found)
            found = found.to(torch.promote_types(found.dtype, torch.float32))
            found.masked_fill_(~seen, torch.finfo(found.dtype).min)
            weights = torch.softmax(found, -1, out=found).to(value.dtype)
            ctx.save_for_backward(query, key, ahead_query, ahead_key, value, weights, ahead, seen)
            ctx.scaling = scaling
            return (_grouped(weights, value) @ value).view(*weights.shape[:-1], value.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given):
        """Return the gradients of all queries and keys, and of the value."""
        query, key, ahead_query, ahead_key, value, weights, ahead, seen = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            given = _grouped(given, value)
            grad_value = _grouped(weights, value).transpose(-1, -2) @ given
            slope = (given @ value.transpose(-1, -2)).view(weights.shape)
            slope = slope.to(torch.promote_types(slope.dtype, torch.float32)).mul_(weights)
            total = slope.sum(-1, keepdim=True)
            slope.addcmul_(weights.to(slope.dtype), total, value=-1).mul_(ctx.scaling)
            parts, slopes = [], (slope * (seen & ~ahead), slope.mul_(seen & ahead))
            for some, one, other in zip(slopes, (query, ahead_query), (key, ahead_key), strict=True):
                some = _grouped(some.to(value.dtype), value)
                parts.append((some @ other).view(one.shape))
                parts.append(some.transpose(-1, -2) @ _grouped(one, value))
        return *parts, grad_value, None, None, None


def _grouped(states: Tensor, like: Tensor) -> Tensor:
    """Put the heads that share a key one after another: (batch, key heads, heads of each times queries, ...)."""
    return states.reshape(len(states), like.shape[1], -1, states.shape[-1])


def _pairs(query: Tensor, key: Tensor) -> Tensor:
    """Return the scores of all pairs: (batch, heads, queries, keys)."""
    return (_grouped(query, key) @ key.transpose(-1, -2)).view(*query.shape[:-1], key.shape[-2])

"""Attention for which what comes after a token stands at the positions before it."""

# Functions of autograd have no types.
# mypy: allow-untyped-defs

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_ext.attention.by_hand import attended, probabilities, scores
from hf_ext.attention.intercept import Attended, visible
from hf_ext.attention.rotary import Rotary

#: A block of queries has that many at least, and a text is parted in that many at most. Its own keys are scored twice.
LEAST, MOST = 64, 8


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
        self._masks: dict[int, tuple[Any, Tensor, Tensor | None]] = {}

    def begin(self, inputs: dict[str, Any] | None, both_ways: Tensor | None = None) -> None:
        """Learn at which positions the tokens of the next training pass stand.

        Args:
            inputs: the batch; None for a pass without a mirror.
            both_ways: (batch,) bool, the rows in which anything looks ahead; all if None.
        """
        self._parts = None
        self._masks.clear()
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
            unseen, _ = self._masks_of(mask, query, key)
            return self._mirrored(module, (query, key, value), unseen, self.positions, call), None
        rows, others, back = self._parts
        order, sizes = torch.cat([rows, others]), [len(rows), len(others)]
        unseen, behind = self._masks_of(mask, query, key, self._parts)
        turned, straight = zip(
            *(_Rows.apply(part, order, back).split(sizes) for part in (query, key, value)), strict=True
        )  # type: ignore[no-untyped-call]
        places = self.positions if len(self.positions) == 1 else self.positions[rows]
        own = call if behind is not None else {**call, "is_causal": True}
        found = self._mirrored(module, turned, unseen, places, call), plain(module, *straight, behind, **own)[0]
        return _Rows.apply(torch.cat(found), back, order), None  # type: ignore[no-untyped-call]

    def _masks_of(
        self, mask: Any, query: Tensor, key: Tensor, parts: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Part a mask, which most layers share: what mirrored rows do not see, 0 or the least number, and the others'.

        That is None where it is the causal one, which a model's own attention knows by itself if it takes bools.
        """
        if id(mask) not in self._masks:
            some, behind = mask, None
            if parts is not None:
                some, behind = mask.index_select(0, parts[0]), mask.index_select(0, parts[1])
                causal = torch.ones(behind.shape[-2:], dtype=torch.bool, device=mask.device).tril()
                if behind.dtype == torch.bool and bool((behind == causal).all()):
                    behind = None
            seen = visible(some, query, key)
            unseen = torch.zeros(seen.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=seen.device)
            unseen.masked_fill_(~seen, torch.finfo(unseen.dtype).min)
            self._masks[id(mask)] = mask, unseen, behind  # the mask, so that no other gets its id
        return self._masks[id(mask)][1:]

    def _mirrored(
        self, module: Any, states: tuple[Tensor, ...], unseen: Tensor, places: Tensor, call: dict[str, Any]
    ) -> Tensor:
        query, key, value = states
        by, layer, window = -2 * places[:, None, :], module.layer_idx, self.windows[module.layer_idx]

        def turn(states: Tensor, times: int = 1) -> Tensor:
            return self.rotary.rotate(layer, states, times * by, self.farthest)

        if window is not None:
            place = places[:, None]
            far = place[..., None, :] - place[..., None] >= window
            unseen = unseen.masked_fill(far, torch.finfo(unseen.dtype).min)
        dropout = call.get("dropout") or 0.0
        if dropout or any(call.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
            ahead = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
            found = torch.where(ahead, scores(turn(query), turn(key), call), scores(query, key, call))
            return attended(nn.functional.dropout(probabilities(found, unseen == 0, call), dropout), value)
        scaling = call.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        out: Tensor = _TwoScores.apply(query, key, value, turn, unseen, scaling, dtype)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2).contiguous()


class _Rows(torch.autograd.Function):
    """Rows in another order; back they go by the inverse order, since adding them up one by one is slow."""

    @staticmethod
    def forward(ctx: Any, states, order, back):
        """Return the rows that `order` names; `back` undoes it."""
        ctx.back = back
        return states.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, given):
        """Return the gradients in the order as it was."""
        return given.index_select(0, ctx.back), None, None


class _TwoScores(torch.autograd.Function):
    """Attention by turned queries and keys for what is ahead, block by block of the queries.

    Keys before a block take the plain score only, keys after it the other one; its own keys both.
    """

    @staticmethod
    def forward(ctx: Any, query, key, value, turn, unseen, scaling: float, dtype):
        """Return (batch, heads, queries, width); `turn` rotates states, or back with -1."""
        with torch.autocast(query.device.type, enabled=False):
            states = [part.to(dtype) for part in (query, key, turn(query), turn(key), value)]
            wide = torch.promote_types(dtype, torch.float32)
            # nothing is learnt from seeing nothing
            ctx.scale = (unseen == 0).any(-1, keepdim=True).to(dtype) * scaling
            result, kept = torch.empty_like(states[0][..., : value.shape[-1]]), []
            q, k, other_q, other_k, v = states
            for at in _blocks(query.shape[2]):
                found = q.new_empty(*q.shape[:2], at.stop - at.start, k.shape[2])
                _pairs(q[:, :, at] * scaling, k[:, :, : at.stop], found[..., : at.stop])
                own = found[..., at].clone()
                _pairs(other_q[:, :, at] * scaling, other_k[:, :, at.start :], found[..., at.start :])
                found[..., at] = torch.where(_upper(at, q.device), found[..., at], own)
                found = found.to(wide).add_(unseen[..., at, :])
                weights = torch.softmax(found, -1, out=found).to(dtype)
                kept.append(weights)
                result[:, :, at] = (_grouped(weights, v) @ v).view(*weights.shape[:-1], v.shape[-1])
        ctx.save_for_backward(*states, result, *kept)
        ctx.turn, ctx.dtypes = turn, (query.dtype, key.dtype, value.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given):
        """Return the gradients of query, key and value."""
        q, k, other_q, other_k, v, result, *kept = ctx.saved_tensors
        pairs = ((q, k), (other_q, other_k))
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            given = given.to(q.dtype)
            total = (given.to(wide) * result).sum(-1, keepdim=True)
            grad_value = torch.zeros_like(v)
            grads = [(torch.empty_like(one), torch.zeros_like(other)) for one, other in pairs]
            for at, weights in zip(_blocks(q.shape[2]), kept, strict=True):
                some = _grouped(given[:, :, at], v)
                grad_value += _grouped(weights, v).transpose(-1, -2) @ some
                slope = (some @ v.transpose(-1, -2)).view(weights.shape).to(wide)
                slope = slope.sub_(total[:, :, at]).mul_(weights).to(q.dtype)
                scale, own, upper = ctx.scale[..., at, :], slope[..., at].clone(), _upper(at, q.device)
                for (one, other), (grad_one, grad_other), keys, mask in zip(
                    pairs, grads, (slice(0, at.stop), slice(at.start, None)), (upper, ~upper), strict=True
                ):
                    slope[..., at] = own.masked_fill(mask, 0)
                    part = _grouped(slope[..., keys], v)
                    grad_one[:, :, at] = (part @ other[:, :, keys]).view(*weights.shape[:-1], -1) * scale
                    grad_other[:, :, keys] += part.transpose(-1, -2) @ _grouped(one[:, :, at] * scale, v)
            found = [plain.add_(ctx.turn(turned, -1)) for plain, turned in zip(*grads, strict=True)]
        return *(grad.to(dtype) for grad, dtype in zip((*found, grad_value), ctx.dtypes, strict=True)), *(None,) * 4


def _blocks(queries: int) -> list[slice]:
    count = min(max(queries // LEAST, 1), MOST)
    ends = [queries * number // count for number in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _upper(at: slice, device: torch.device) -> Tensor:
    """Return which pairs of tokens of one block look ahead."""
    return torch.ones((at.stop - at.start,) * 2, dtype=torch.bool, device=device).triu(1)


def _grouped(states: Tensor, like: Tensor) -> Tensor:
    """Put the heads that share a key one after another: (batch, key heads, heads of each times queries, ...)."""
    return states.reshape(len(states), like.shape[1], -1, states.shape[-1])


def _pairs(query: Tensor, key: Tensor, out: Tensor) -> None:
    """Write the scores of all pairs: (batch, heads, queries, keys), a part of the columns of a whole tensor."""
    queries, keys = _grouped(query, key).flatten(0, 1), key.transpose(-1, -2).flatten(0, 1)
    torch.bmm(queries, keys, out=out.view(len(queries), -1, out.shape[-1]))

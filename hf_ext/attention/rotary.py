"""Move keys and queries to other positions, on models whose positions are rotations.

A rotary embedding turns pairs of a head's numbers by an angle that grows with the position, so that
a key at position `p` becomes the one at `p + d` by a rotation by `d`: R(p + d) x = R(d) R(p) x. Which
numbers make a pair, how many are turned, and by what angles, differs from model to model and from
layer to layer. None of it is read off names: the model is run on a few tokens at several positions,
and a reading counts if it turns the queries and keys of the one run into those of the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext import adapter
from hf_ext.attention.intercept import intercept
from hf_ext.layers import in_evaluation

#: Largest difference, as a share of the largest number, that rounding may explain, by bytes of a number.
TOLERANCE = {8: 1e-4, 4: 1e-3, 2: 0.1}
#: Tokens of the probe, where they begin, and how far they are moved at most.
TOKENS, START, FAR = 6, 2, 1024

_KNOWN: weakref.WeakKeyDictionary[nn.Module, Rotary | str] = weakref.WeakKeyDictionary()


@dataclasses.dataclass
class Angles:
    """Where a model gets its angles: the call of a module that returned cosines and sines.

    Args:
        module: the module.
        args: what it was called with; the positions are replaced.
        kwargs: likewise.
        take: which of the numbers it returns belong to different pairs: `halves` (the first half, the
            second repeats it), `neighbours` (every second) or `all`.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    take: str = "halves"
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict, repr=False)

    def ask(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `(positions, pairs)` in float32, without the scale some models give them."""

        def put(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return value.new_zeros(1, 1, 1, dtype=torch.float32, device=positions.device)
            return torch.cat([positions.new_zeros(1), positions])[None]

        given = {name: put(value) for name, value in self.kwargs.items()}
        cos, sin = (found[0].float() for found in self.module(*map(put, self.args), **given))
        cos, sin = self._pairs(cos), self._pairs(sin)
        return (cos / cos[:1])[1:], (sin / cos[:1])[1:]

    def table(self, longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of all positions up to `longest` at least."""
        if device not in self._tables or len(self._tables[device][0]) <= longest:
            size = 1 << max(longest, 63).bit_length()
            self._tables[device] = self.ask(torch.arange(size, device=device))
        return self._tables[device]

    def _pairs(self, found: Tensor) -> Tensor:
        width = found.shape[-1]
        return {"halves": found[..., : width // 2], "neighbours": found[..., ::2], "all": found}[self.take]


@dataclasses.dataclass(frozen=True)
class Turn:
    """How one layer turns its queries and keys.

    Args:
        angles: by what angles.
        neighbours: whether a pair are two numbers side by side, or one of each half.
        last: whether the numbers that turn are the last of a head, where not all do, or the first.
    """

    angles: Angles
    neighbours: bool
    last: bool

    def __call__(self, states: Tensor, by: Tensor, longest: int | None = None) -> Tensor:
        """Turn `(..., width)` states by `by` positions, an int tensor that broadcasts to all but the width."""
        if longest is None:  # looking it up waits for the device
            longest = int(by.abs().max()) if by.numel() else 0
        cos, sin = (table[by.abs()] for table in self.angles.table(longest, states.device))
        sin = sin * by.sign()[..., None]
        pairs = cos.shape[-1]
        start = states.shape[-1] - 2 * pairs if self.last else 0
        inside = states[..., start : start + 2 * pairs].to(torch.promote_types(states.dtype, torch.float32))
        # Element `i` of either is one number of pair `i`.
        parts = inside.unflatten(-1, (pairs, 2) if self.neighbours else (2, pairs))
        one, other = parts.unbind(-1 if self.neighbours else -2)
        turned = torch.stack([one * cos - other * sin, other * cos + one * sin], -1 if self.neighbours else -2)
        turned = turned.flatten(-2).to(states.dtype)
        rest = states[..., :start], states[..., start + 2 * pairs :]
        # Broadcasting may have repeated what turns; what does not is repeated alike.
        return torch.cat([rest[0].expand(*turned.shape[:-1], -1), turned, rest[1].expand(*turned.shape[:-1], -1)], -1)


class Rotary:
    """The rotations of a model's layers, as it was found to do them.

    Args:
        turns: for every layer how it turns queries and keys, None for a layer without positions.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, ids = tiny_models.shared("llama"), torch.tensor([[5, 6, 7]])
        >>> rotary = Rotary.of(model)
        >>> def keys(start):
        ...     out = model(ids, position_ids=torch.arange(start, start + 3)[None], use_cache=True)
        ...     return out.past_key_values.layers[1].keys
        >>> moved = rotary.rotate(1, keys(0), torch.tensor(40))
        >>> bool((moved - keys(40)).abs().max() < 1e-4)
        True
    """

    def __init__(self, turns: list[Turn | None]) -> None:
        self.turns = turns

    @classmethod
    def of(cls, model: Any) -> Rotary:
        """Ask a model how it turns its queries and keys; the answer is remembered as long as the model lives.

        Args:
            model: a decoder-only model.

        Raises:
            ValueError: its positions are not rotations, or not such as the probe confirms.
        """
        if model not in _KNOWN:
            _KNOWN[model] = _ask(model)
        known = _KNOWN[model]
        if isinstance(known, str):
            raise ValueError(known)
        return known

    def rotate(self, layer: int, states: Tensor, by: Tensor, longest: int | None = None) -> Tensor:
        """Move queries or keys of a layer by some positions.

        Args:
            layer: number of the layer.
            states: `(..., width)` queries or keys as they are after the model has put them into place.
            by: int tensor that broadcasts to all dimensions of the states but the last; negative moves back.
            longest: no number in `by` is larger than this; looked up if None, which waits for the device.

        Returns:
            The states at the other positions, likewise; broadcast to `by`.
        """
        turn = self.turns[layer]
        return states if turn is None else turn(states, by, longest)

    @contextlib.contextmanager
    def positions(self) -> Iterator[Callable[[], Tensor]]:
        """Watch at which positions the model puts its tokens.

        Yields:
            A function that returns the `(rows or 1, tokens)` positions of the running or last forward pass.
        """
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[:] = [value for value in (*args, *kwargs.values()) if _is_positions(value)]

        with contextlib.ExitStack() as stack:
            for module in {turn.angles.module for turn in self.turns if turn is not None}:
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            yield lambda: seen[0]


def _is_positions(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


@torch.no_grad()
def _ask(model: Any) -> Rotary | str:
    name = type(model).__name__
    no = f"{name} has no rotary positions that can be moved"
    if not hasattr(model, "config") or model.config.is_encoder_decoder:
        return f"{no}: it is not a decoder-only language model"
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or FAR
    distances = (1, min(FAR, context - START - TOKENS))
    if distances[1] < 8:
        return f"{no}: its context of {context} tokens is too short to try it out"
    try:
        adapter.attention_configs(model)
    except ValueError as error:
        return f"{no}: {error}"
    try:
        here, calls = _run(model, config, START)
        there = [_run(model, config, START + distance)[0] for distance in distances]
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        return f"{no}: it does not take positions ({type(error).__name__}: {str(error).splitlines()[0]})"
    if len(here) != config.num_hidden_layers:
        return f"{no}: {len(here)} of its {config.num_hidden_layers} layers attend"
    tried = [Turn(angles, neighbours, last) for angles, neighbours, last in _readings(calls)]
    if not tried:
        return f"{no}: no part of it computes rotations; its positions are absolute, or biases of the scores"
    turns: list[Turn | None] = []
    for layer in sorted(here):
        pairs = [[(here[layer][i], other[layer][i]) for other in there] for i in (0, 1)]
        if all(_same(a, b) for states in pairs for a, b in states):
            turns.append(None)
            continue
        found = next((turn for turn in tried if _confirmed(turn, pairs, distances)), None)
        if found is None:
            return f"{no}: keys of layer {layer} at other positions are not rotations of each other as far as known"
        turns.append(found)
    if not any(turns):
        return f"{no}: its keys are the same at all positions"
    for turn in turns:
        if turn is not None and not _same_at_any_length(turn.angles, 4 * context):
            return f"{no}: its frequencies depend on the length of the text (dynamic or long RoPE)"
    return Rotary(turns)


def _run(model: Any, config: Any, start: int) -> tuple[dict[int, tuple[Tensor, Tensor]], list[Angles]]:
    """Run the probe from position `start` on: queries and keys of the layers, calls that may have given angles."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    calls: list[Angles] = []
    device = adapter.device_of(model)
    ids = ((torch.arange(TOKENS, device=device) * 17 + 5) % config.vocab_size)[None]
    places = torch.arange(start, start + TOKENS, device=device)[None]

    def keep(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **kwargs: Any) -> Any:
        found[getattr(module, "layer_idx", len(found))] = query, key
        return plain(module, query, key, value, mask, **kwargs)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        pair = isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, Tensor) for part in output)
        given = [value for value in (*args, *kwargs.values()) if _is_positions(value)]
        if pair and len(given) == 1 and given[0].shape == places.shape and output[0].shape == output[1].shape:
            small = {name: _shrunk(value) for name, value in kwargs.items()}
            calls.append(Angles(module, tuple(map(_shrunk, args)), small))

    call = model if adapter.needs_synced_gpus(model) else model.forward
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_evaluation(model))
        stack.enter_context(intercept(model, keep))
        for module in model.modules():
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        call(ids, attention_mask=torch.ones_like(ids), position_ids=places, use_cache=False, return_dict=True)
    return found, calls


def _shrunk(value: Any) -> Any:
    """Do not keep the states a module was called with, only that there were some."""
    return value[..., :0].clone() if isinstance(value, Tensor) and value.is_floating_point() else value


def _readings(calls: list[Angles]) -> Iterator[tuple[Angles, bool, bool]]:
    """Yield all ways to understand the angles that were seen, the usual ones first."""
    for call, take in itertools.product(calls, ("halves", "neighbours", "all")):
        angles = dataclasses.replace(call, take=take, _tables={})
        for last, neighbours in itertools.product((False, True), (False, True)):
            yield angles, neighbours, last


def _same(a: Tensor, b: Tensor) -> bool:
    largest = float(a.abs().max())
    return bool((a - b).abs().max() <= TOLERANCE[a.element_size()] * largest)


def _confirmed(turn: Turn, pairs: list[list[tuple[Tensor, Tensor]]], distances: tuple[int, ...]) -> bool:
    width = 2 * turn.angles.ask(torch.zeros(1, dtype=torch.long, device=pairs[0][0][0].device))[0].shape[-1]
    return all(
        width <= here.shape[-1] and _same(turn(here, torch.tensor(distance, device=here.device)), there)
        for states in pairs
        for (here, there), distance in zip(states, distances, strict=True)
    )


def _same_at_any_length(angles: Angles, length: int) -> bool:
    """Tell whether the angles of the first positions stay the same when there is one far away."""
    device = next(itertools.chain(angles.module.buffers(), angles.module.parameters())).device
    near = torch.arange(8, device=device)
    alone, beside = angles.ask(near), angles.ask(torch.cat([near, near.new_tensor([length])]))
    angles.ask(near)  # lets a module that has adapted itself to the length forget it
    return all(torch.allclose(a, b[:8]) for a, b in zip(alone, beside, strict=True))

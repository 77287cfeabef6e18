"""A cache that is addressed by row: column `c` of a lane holds its token `c`, whatever the other lanes do.

    lane 0   A B C D . . .        no padding on the left and no holes: what a lane has accepted is one
    lane 1   a b c d e f .        block from column 0 on. A tree is written behind it, the accepted
             `---kept---'tree     path is moved to the block's end, and the rest is simply overwritten.

Forgetting tokens costs nothing, and a step writes its new columns in place, where a cache that
grows by concatenation copies everything. A sliding-window layer drops what has left the window
now and then; its column `c` holds token `c + dropped`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from hf_ext import adapter

#: Columns that a sliding-window layer may hold beyond its window before it drops some.
SLACK = 64
#: Columns that trees of usual size take beyond the longest text.
SCRATCH = 64
#: Columns beyond what is needed, lest each step copies: of tensors, and of a block, whose memory costs nothing
#: before it is written.
SPARE, FREE = 64, 512


class Columns:
    """Where the layers of one kind write and read; all layers with the same window share it.

    Args:
        lanes: number of lanes.
        window: sliding window of the layers, None for those without.
        drops: whether tokens that have left the window are dropped.

    Attributes:
        dropped: for every lane the tokens before its column 0.
        start: first column of the tokens to be written, if it is the same in every lane.
        slots: `(lanes, n)` int64 columns of the tokens to be written, otherwise.
        stop: columns that attention reads.
        limit: columns that the longest text takes, None if that is not known.
        block: `(2 * layers, lanes, heads, columns, width)` keys and values of all layers that are alike, on a
            CPU; a path is moved in all of them at once. None before they hold something, and where there is none.
        filled: columns that may hold something.
    """

    def __init__(self, lanes: int, window: int | None, drops: bool = True) -> None:
        self.window, self.drops = window, drops
        self.dropped = [0] * lanes
        self.start: int | None = 0
        self.slots: torch.Tensor | None = None
        self.stop = 0
        self.limit: int | None = None
        self.layers: list[RowLayer] = []
        self.block: torch.Tensor | None = None
        self.filled = 0

    def aim(self, lengths: list[int], earlier: int, count: int, device: torch.device) -> None:
        """Get ready to write `count` columns behind `earlier` columns of a tree behind each lane's block."""
        starts = [length - dropped + earlier for length, dropped in zip(lengths, self.dropped, strict=True)]
        self.stop = max(starts) + count
        self.filled = max(self.filled, self.stop)
        if len(set(starts)) == 1:
            self.start, self.slots = starts[0], None
        else:
            self.start = None
            self.slots = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)

    def move(self, lengths: list[int], paths: list[list[int]]) -> None:
        """Move the accepted nodes of each lane to the end of its block.

        Args:
            lengths: tokens in each block.
            paths: numbers of the accepted nodes in the tree, from 0, increasing.
        """
        starts = [length - dropped for length, dropped in zip(lengths, self.dropped, strict=True)]
        first = [next((place for place, node in enumerate(path) if node != place), len(path)) for path in paths]
        if all(place == len(path) for place, path in zip(first, paths, strict=True)):
            return  # they lie where they should
        if self.block is not None:
            for lane, (start, place, path) in enumerate(zip(starts, first, paths, strict=True)):
                if place < len(path):
                    source = torch.tensor([start + node for node in path[place:]])
                    _move(self.block[:, lane], start + place, source)
        others = [layer for layer in self.layers if not layer.shared and layer.keys is not None]
        if not others:
            return
        if len(paths) == 1:
            source = torch.tensor(paths[0]) + starts[0]
            for layer in others:
                _move(layer.keys, starts[0], source)
                _move(layer.values, starts[0], source)
            return
        # A lane with a shorter path copies further columns onto themselves.
        longest = max(map(len, paths))
        filled = [path + list(range(len(path), longest)) for path in paths]
        begin, last = torch.tensor(starts)[:, None], others[0].keys.shape[2] - 1
        for layer in others:
            layer.move((torch.tensor(filled) + begin).clamp(max=last), (torch.arange(longest) + begin).clamp(max=last))

    def trim(self, lengths: list[int]) -> None:
        """Drop what has left the window, once there is much of it."""
        if self.window is None or not self.drops:
            return
        surplus = [max(n - d - (self.window - 1), 0) for n, d in zip(lengths, self.dropped, strict=True)]
        if max(surplus, default=0) < SLACK:
            return
        for layer in self.layers:
            layer.shift(surplus)
        self.dropped = [d + s for d, s in zip(self.dropped, surplus, strict=True)]

    def select(self, lanes: list[int]) -> None:
        """Go on with these lanes only."""
        index = torch.tensor(lanes)
        if self.block is not None:
            self._refill(self.block[..., : self.filled, :].index_select(1, index), self.block.shape[3])
        for layer in self.layers:
            if not layer.shared:
                layer.select(index)
        self.dropped = [self.dropped[lane] for lane in lanes]

    def make_room(self, layer: RowLayer, keys: torch.Tensor, values: torch.Tensor, needed: int) -> None:
        """Give a layer that holds nothing yet so many columns or more, of zeros, for keys and values like these."""
        alike = keys.shape == values.shape and keys.dtype == values.dtype and keys.device == values.device
        if alike and keys.device.type == "cpu" and not any(one.is_initialized for one in self.layers):
            shape = (2 * len(self.layers), *keys.shape[:2], self._room(needed, free=True), keys.shape[3])
            self.block = _untouched(shape, keys.dtype)
        block = self.block
        if block is not None and alike and keys.device == block.device and keys.dtype == block.dtype:
            layer.shared = block[0, :, :, 0].shape == keys[:, :, 0].shape and len(block) == 2 * len(self.layers)
        if layer.shared and block is not None:
            self._lay_out(block)
            if block.shape[3] < needed:
                self.grow(layer, needed)
        else:
            layer.keys, layer.values = (_zeros(like, self._room(needed)) for like in (keys, values))

    def grow(self, layer: RowLayer, needed: int) -> None:
        """Give a layer so many columns or more, and with it those that share its block."""
        if layer.shared and self.block is not None:
            self._refill(self.block[..., : self.filled, :], self._room(needed, free=True))
            return
        for name in ("keys", "values"):
            held = getattr(layer, name)
            new = _zeros(held, self._room(needed))
            new[:, :, : held.shape[2]] = held
            setattr(layer, name, new)

    def _room(self, needed: int, free: bool = False) -> int:
        spare = FREE if free and self.window is None else SPARE
        room, limit = needed + max(needed // 8, spare), self.limit  # few copies, never much more than is needed
        if limit is None:
            return room
        # A chain stays within the text. Trees that do not get the columns of all to come at once, lest each copy.
        return min(room, limit) if needed <= limit else max(min(room, limit + SCRATCH), needed)

    def _refill(self, held: torch.Tensor, columns: int) -> None:
        """Go on with a block of so many columns that begins with these."""
        shape = (*held.shape[:3], columns, held.shape[4])
        block = _untouched(shape, held.dtype)
        stop = min(held.shape[3], columns)
        block[..., :stop, :] = held[..., :stop, :]
        self._lay_out(block)

    def _lay_out(self, block: torch.Tensor) -> None:
        """Let the layers that share a block look into this one."""
        self.block = block
        for number, layer in enumerate(self.layers):
            if layer.shared:
                layer.keys, layer.values = block[2 * number], block[2 * number + 1]


class RowLayer(adapter.cache_layer_base()):  # type: ignore[misc]
    """Keys and values of one layer, addressed by row; transformers' models use it as any cache layer.

    Args:
        columns: where to write and what to read, shared with the layers of the same kind.
        fixed: whether the tensors are those of a static cache and cannot grow.

    Attributes:
        shared: whether keys and values are views of the columns' block.
    """

    keys: Any
    values: Any
    is_compileable = False
    is_croppable = False

    def __init__(self, columns: Columns, fixed: bool = False) -> None:
        super().__init__()
        self.columns, self.fixed, self.shared = columns, fixed, False
        self.is_sliding = columns.window is not None
        columns.layers.append(self)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for the first columns."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.columns.make_room(self, key_states, value_states, self.columns.stop)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the columns that `columns` aims at; return all that attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        columns = self.columns
        if columns.stop > self.keys.shape[2]:
            self._grow(columns.stop)
        if columns.start is not None:
            stop = columns.start + key_states.shape[2]
            self.keys[:, :, columns.start : stop] = key_states
            self.values[:, :, columns.start : stop] = value_states
        else:
            slots = columns.slots.to(self.keys.device)  # type: ignore[union-attr]
            lanes = torch.arange(len(slots), device=slots.device)[:, None]
            self.keys[lanes, :, slots] = key_states.transpose(1, 2)
            self.values[lanes, :, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, : columns.stop], self.values[:, :, : columns.stop]

    def get_seq_length(self) -> int:
        """Return the columns before those that are being written, where lanes agree on it."""
        return self.columns.start or 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys."""
        return self.columns.stop, 0

    def get_max_length(self) -> int:
        """Return -1: the layer grows."""
        return -1

    def fill(self, keys: torch.Tensor, values: torch.Tensor, kept: list[torch.Tensor]) -> None:
        """Take over the columns of another layer.

        Args:
            keys: `(lanes, heads, columns, width)`.
            values: likewise.
            kept: for each lane the columns to take, in order.
        """
        longest = max(map(len, kept))
        if not self.fixed:
            self.dtype, self.device = keys.dtype, keys.device
            self.columns.filled = max(self.columns.filled, longest)
            self.columns.make_room(self, keys, values, longest)
            self.is_initialized = True
        for lane, columns in enumerate(kept):
            whole = len(columns) == keys.shape[2]
            at = slice(None) if whole else columns.to(keys.device)
            # In a static cache source and target are one tensor; the index makes a copy.
            for new, old in ((self.keys, keys), (self.values, values)):
                if not (whole and self.fixed):
                    new[lane, :, : len(columns)] = old[lane][:, at]

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy columns `source` to columns `target`, both `(lanes, n)`."""
        source, target = source.to(self.keys.device), target.to(self.keys.device)
        lanes = torch.arange(len(source), device=source.device)[:, None]
        for states in (self.keys, self.values):
            states[lanes, :, target] = states[lanes, :, source]

    def shift(self, surplus: list[int]) -> None:
        """Drop the first `surplus` columns of each lane."""
        if self.keys is None:
            return
        stop = min(self.columns.filled, self.keys.shape[2])
        for states in (self.keys, self.values):
            for lane, count in enumerate(surplus):
                if count:
                    states[lane, :, : stop - count] = states[lane, :, count:stop].clone()

    def select(self, lanes: torch.Tensor) -> None:
        """Go on with these lanes only."""
        if self.keys is not None:
            self.keys = self.keys.index_select(0, lanes.to(self.keys.device))
            self.values = self.values.index_select(0, lanes.to(self.values.device))

    def _grow(self, needed: int) -> None:
        if self.fixed:
            raise RuntimeError(
                f"a step needs {needed} columns of a static cache that has {self.keys.shape[2]}; the engine should "
                "have drafted less"
            )
        self.columns.grow(self, needed)


def _zeros(like: torch.Tensor, columns: int) -> torch.Tensor:
    # Not empty: what stands in a masked column is multiplied by 0, and 0 times NaN is NaN.
    return like.new_zeros(like.shape[0], like.shape[1], columns, like.shape[3])


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros on the CPU whose memory is taken page by page when it is written, as `torch.zeros` does not."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64  # where torch's own memory would begin
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)


def _move(states: torch.Tensor, start: int, source: torch.Tensor) -> None:
    """Copy the columns `source` of `(..., columns, width)` to `start` and after."""
    states.narrow(-2, start, len(source)).copy_(states.index_select(-2, source.to(states.device)))


class RowCache(Cache):
    """The cache of one model, addressed by row.

    Args:
        model_cache: a cache of the model. Its tokens are taken over if `kept` says which.
        windows: sliding window of each of the model's layers, None for those without.
        lanes: number of lanes.
        kept: `(lanes, columns)` bool, the columns of `model_cache` that hold tokens.
        limit: tokens of the longest text there will be, None if that is not known.
        release: whether `model_cache` lets go of the tokens, layer by layer, so that none is held twice.
    """

    def __init__(
        self,
        model_cache: Cache,
        windows: list[int | None],
        lanes: int,
        kept: torch.Tensor | None = None,
        limit: int | None = None,
        release: bool = False,
    ) -> None:
        self.groups: dict[int | None, Columns] = {}
        layers = []
        for layer, window in zip(model_cache.layers, windows, strict=True):
            if window not in self.groups:
                # A caller's cache may keep all tokens although the model does not look at them.
                self.groups[window] = Columns(lanes, window, drops=adapter.layer_window(layer) is not None)
                if window is None:
                    self.groups[window].limit = limit
            fixed = kept is not None and adapter.layer_buffers(layer) is not None
            layers.append(RowLayer(self.groups[window], fixed))
        for layer, new in zip(model_cache.layers, layers, strict=True):
            columns = new.columns
            buffers = None if kept is None else adapter.layer_buffers(layer)
            held = None if kept is None else adapter.layer_tensors(layer)
            if kept is not None and held is not None:
                keys, values, dropped = held
                here = kept[:, dropped : dropped + keys.shape[2]]
                if buffers is not None:
                    new.keys, new.values = buffers
                    new.dtype, new.device, new.is_initialized = new.keys.dtype, new.keys.device, True
                new.fill(keys, values, [row.nonzero().flatten() for row in here])
                columns.dropped = kept[:, :dropped].sum(1).tolist()
                if release:
                    del held, keys, values
                    adapter.release_layer(layer)
        super().__init__(layers=layers)

    @property
    def free_columns(self) -> int | None:
        """Columns of the tightest layer of fixed size, None if all can grow."""
        sizes = [layer.keys.shape[2] for layer in self.layers if layer.fixed]
        return min(sizes, default=None)

    def lane(self, lane: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copy the tokens of a lane: for every layer keys and values `(heads, columns, width)`."""
        found = []
        for layer in self.layers:
            if layer.keys is None:
                found.append((torch.empty(0), torch.empty(0)))
                continue
            stop = length - layer.columns.dropped[lane]
            found.append((layer.keys[lane, :, :stop].clone(), layer.values[lane, :, :stop].clone()))
        return found


def write_back(cache: Cache, rows: list[list[tuple[torch.Tensor, torch.Tensor]]], ends: list[int]) -> None:
    """Lay tokens out in a cache of transformers as in a padded batch.

    Args:
        cache: the cache; its content is replaced.
        rows: for every row what `RowCache.lane` returned.
        ends: the column behind each row's last token; zeros stand where a row has no tokens.
    """
    total = max(ends)
    for index, layer in enumerate(cache.layers):
        if not rows[0][index][0].numel():
            continue  # a layer that holds nothing of its own
        window = adapter.layer_window(layer)
        held = total if window is None else min(window, total)
        tables = []
        for which in (0, 1):
            first = rows[0][index][which]
            table = first.new_zeros(len(rows), first.shape[0], held, first.shape[2])
            for new, row, end in zip(table, rows, ends, strict=True):
                tokens = row[index][which]
                stop = end - (total - held)
                count = min(tokens.shape[1], max(stop, 0))
                if count:
                    new[:, stop - count : stop] = tokens[:, tokens.shape[1] - count :]
            tables.append(table)
        adapter.refill_layer(layer, tables[0], tables[1], total - held)


def windows_of(model: PreTrainedModel, cache: Cache) -> list[int | None]:
    """Return the sliding window of each layer of a cache, as the model's own cache would have it."""
    own = adapter.empty_cache(model).layers
    layers = own if len(own) == len(cache.layers) else cache.layers
    return [adapter.layer_window(layer) for layer in layers]

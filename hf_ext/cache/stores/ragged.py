"""Every head of every row holds its own number of entries, one behind the other in flat tensors.

    row 0              row 1
    head 0   head 1    head 0      head 1
    aaaaa.   bb.       cccccccc.   d.          starts 0 6 9 18   lengths 5 2 8 1   (. is room)

Padding is not stored at all. New tokens are written into the room of each segment; when one is full,
all are moved apart again. Columns are stored as steps, mostly a byte for each; see `steps.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ext.cache.entries import NOTHING, Entries
from hf_ext.cache.stores.steps import DTYPES, columns_of, fits, steps_after, steps_of

#: The room of a segment is a 64th of the longest one, and no more than this.
MOST_ROOM = 256


class RaggedStore:
    """Entries of one layer in flat tensors.

    Args:
        fields: names of the fields that entries carry.
    """

    ragged = True
    holes: tuple[int, ...] = ()  # padding is not stored

    def __init__(self, fields: tuple[str, ...] = ()) -> None:
        self.field_names = fields
        self.starts = self.lengths = self.room = torch.zeros(0, 0, dtype=torch.int64)
        self.buffers: dict[str, Tensor] = {}
        #: Entries of each row, all heads together.
        self.totals: list[int] = []
        #: The last column of each head, a number if it is the same in all; None if it has to be looked up.
        self._last: Tensor | int | None = None
        #: Where the next token of every segment goes, for `append_one`, and how many more there is room for.
        self._place, self._left = self.starts, 0

    @property
    def lengths(self) -> Tensor:
        """`(rows, heads)` int64."""
        return self._lengths + self._since if self._since else self._lengths

    @lengths.setter
    def lengths(self, lengths: Tensor) -> None:
        #: As they were when something else than `append_one` changed them, and the tokens that it has added since.
        self._lengths, self._since = lengths, 0
        self._segments_then: list[tuple[int, int]] | None = None
        self._left = 0

    def segments(self) -> list[tuple[int, int]]:
        """Return start and length of all segments, without waiting for a device at every token."""
        if self._segments_then is None:
            numbers = (tensor.flatten().tolist() for tensor in (self.starts, self._lengths))
            self._segments_then = list(zip(*numbers, strict=True))
        return [(start, length + self._since) for start, length in self._segments_then]

    def __len__(self) -> int:
        return int(self.lengths.max()) if self.lengths.numel() else 0

    def surplus(self, allowed: Sequence[int]) -> bool:
        """Tell whether the heads of some row hold more entries on average than it is allowed."""
        heads = self._lengths.shape[1]
        return any(total > most * heads for total, most in zip(self.totals, allowed, strict=True))

    def append(self, keys: Tensor, values: Tensor, start: int, real: Tensor | None) -> None:
        """Add new tokens; see `DenseStore.append`."""
        rows, heads, count, _ = keys.shape
        last = self.last_columns(1)[..., 0] if self.buffers and self._last is None else self._last
        last = NOTHING if last is None else last
        one = bool(self.buffers) and count == 1 and real is None
        if one and isinstance(last, int) and fits(start - last, self.buffers["steps"]):
            steps = None
        else:
            steps = steps_after(last, start, count, rows, real, keys.device)
        # The newest token is the last one of every head, unless it is padding.
        self._last = start + count - 1 if real is None else None
        if not self.buffers:
            self.starts = self.lengths = self.room = torch.zeros(rows, heads, dtype=torch.int64, device=keys.device)
            self.buffers = {
                "keys": keys.new_zeros(0, keys.shape[-1]),
                "values": values.new_zeros(0, values.shape[-1]),
                "steps": keys.new_zeros(0, dtype=DTYPES[0]),
                **{name: keys.new_zeros(0, dtype=torch.float32) for name in self.field_names},
            }
        if real is not None and bool(real.all()):
            real = None
        new = count if real is None else real.sum(1, keepdim=True).expand(rows, heads)
        lengths, extra = self.lengths + new, 0
        if bool((lengths > self.room).any()):
            extra = min(max((len(self) + count) // 64, 1), MOST_ROOM)
            self._spread(lengths + extra)
        place = self.starts + self.lengths
        if real is None:
            at, chosen = place[..., None] + torch.arange(count, device=keys.device) if count > 1 else place, slice(None)
            where = at.flatten()
        else:
            at = place[..., None] + (real.long().cumsum(1) - 1)[:, None]
            chosen = real[:, None].expand(rows, heads, count).flatten()  # type: ignore[assignment]
            where = at.flatten()[chosen]
        self.buffers["keys"].index_copy_(0, where, keys.reshape(-1, keys.shape[-1])[chosen])
        self.buffers["values"].index_copy_(0, where, values.reshape(-1, values.shape[-1])[chosen])
        if steps is None:
            self.buffers["steps"].index_fill_(0, where, start - last)
        else:
            self._widen(steps.dtype)
            numbers = steps.expand(-1, heads, -1).to(self.buffers["steps"].dtype)
            self.buffers["steps"].index_copy_(0, where, numbers.reshape(-1)[chosen])
        for name in self.field_names:
            self.buffers[name].index_fill_(0, where, 0)
        if real is None:
            self.totals = [total + heads * count for total in self.totals or [0] * rows]
        else:
            self.totals = lengths.sum(1).tolist()
        self.lengths = lengths
        if extra and real is None:
            self._place, self._left = (self.starts + lengths).flatten(), extra

    def append_one(self, keys: Tensor, values: Tensor, start: int) -> bool:
        """Add a real token if there is room that waits for it; see `DenseStore.append_one`."""
        if not self._left or type(self._last) is not int or self._last != start - 1:
            return False
        self.buffers["keys"].index_copy_(0, self._place, keys.reshape(-1, keys.shape[-1]))
        self.buffers["values"].index_copy_(0, self._place, values.reshape(-1, values.shape[-1]))
        self._place += 1
        self._last = start
        self._since += 1
        self._left -= 1
        heads = self._lengths.shape[1]
        self.totals = [total + heads for total in self.totals]
        return True

    def _widen(self, dtype: torch.dtype) -> None:
        """Make sure that steps of a dtype can be written."""
        if DTYPES.index(dtype) > DTYPES.index(self.buffers["steps"].dtype):
            self.buffers["steps"] = self.buffers["steps"].to(dtype)

    def _flat(self) -> Tensor:
        """Return the indices of all entries in the flat tensors, segment after segment."""
        lengths = self.lengths.flatten()
        ends = lengths.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        shift = torch.repeat_interleave(self.starts.flatten() - (ends - lengths), lengths)
        return torch.arange(total, device=lengths.device) + shift

    def _spread(self, room: Tensor) -> None:
        """Move segments so that each has this much room."""
        ends = room.flatten().cumsum(0)
        segments = list(zip(*(t.flatten().tolist() for t in (self.starts, self.lengths, room)), strict=True))
        most = max(wide - length for _, length, wide in segments)
        for name, tensor in self.buffers.items():
            # The room says already what `append_one` would.
            spare = tensor.new_full((most, *tensor.shape[1:]), int(name == "steps"))
            parts = [[tensor[start : start + n], spare[: wide - n]] for start, n, wide in segments]
            self.buffers[name] = torch.cat([part for pair in parts for part in pair])
        self.starts, self.room = (ends - room.flatten()).view_as(room), room

    def _segments(self) -> tuple[Tensor, Tensor]:
        """Return where entries lie if all heads are as long as the longest, `(rows, heads, n)`, and which are real."""
        most = len(self)
        place = torch.arange(most, device=self.lengths.device) - (most - self.lengths)[..., None]
        return (self.starts[..., None] + place).clamp(min=0), place >= 0

    def entries(self, seen: int, padding: Tensor) -> Entries:
        """Return what is held as plain tensors, heads that hold less with nothing in front: a copy."""
        where, real = self._segments()
        found = {name: tensor[where] for name, tensor in self.buffers.items()}
        columns = columns_of(found.pop("steps").masked_fill_(~real, 0), real.shape[1])
        return Entries(found.pop("keys"), found.pop("values"), columns, seen, padding, found)

    def note(self, fields: Mapping[str, Tensor]) -> None:
        """Replace fields of the entries, given as `entries` returned them."""
        where, real = self._segments()
        for name, value in fields.items():
            self.buffers[name][where[real]] = value[real].to(self.buffers[name].dtype)

    def keep(self, index: Tensor, entries: Entries) -> None:
        """Hold only the entries at `index` of what `entries` returned, `(rows, key heads, k)`, -1 for nothing."""
        where, _ = self._segments()
        real = index >= 0
        columns = entries.columns.gather(-1, index.clamp(min=0)).masked_fill(~real, NOTHING)
        flat = where.gather(-1, index.clamp(min=0))[real]
        buffers = {name: tensor[flat] for name, tensor in self.buffers.items() if name != "steps"}
        self._hold(buffers, columns, real)

    def replace(self, entries: Entries) -> None:
        """Hold these entries instead."""
        whole = {"keys": entries.keys, "values": entries.values, **entries.fields}
        self._hold({name: tensor[entries.real] for name, tensor in whole.items()}, entries.columns, entries.real)

    def _hold(self, buffers: dict[str, Tensor], columns: Tensor, real: Tensor) -> None:
        """Hold flat tensors of entries that lie at these columns, `(rows, key heads, n)`."""
        self.lengths = real.sum(-1)
        self._compact({**buffers, "steps": steps_of(columns).expand(-1, real.shape[1], -1)[real]})

    def _compact(self, buffers: dict[str, Tensor]) -> None:
        ends = self.lengths.flatten().cumsum(0).view_as(self.lengths)
        self.starts, self.room, self.buffers, self._last = ends - self.lengths, self.lengths, buffers, None
        self.totals = self.lengths.sum(1).tolist()

    def settle(self) -> None:
        """Hold nothing but the entries and their room."""

    def last_columns(self, count: int) -> Tensor:
        """Return the columns of the last `count` entries, `(rows, key heads, count)`, -1 where there are fewer."""
        where, real = self._segments()
        columns = columns_of(self.buffers["steps"][where].masked_fill_(~real, 0), real.shape[1])
        return torch.nn.functional.pad(columns, (count - columns.shape[-1], 0), value=NOTHING)  # or cut

    def drop_last(self, count: int) -> None:
        """Forget the last `count` entries of every head."""
        self.lengths, self._last = self.lengths - count, None
        self.totals = self.lengths.sum(1).tolist()

    def select(self, index: Tensor) -> None:
        """Go on with these rows."""
        device = self.starts.device
        index = index.to(device)
        starts, lengths = self.starts[index], self.lengths[index]
        self.starts, self.lengths = starts, lengths
        flat = self._flat()
        self._compact({name: tensor[flat] for name, tensor in self.buffers.items()})

    def repeat(self, times: int) -> None:
        """Repeat every row."""
        self.select(torch.arange(len(self.starts)).repeat_interleave(times))

    def to(self, device: torch.device | str) -> None:
        """Move everything to a device."""
        self.buffers = {name: tensor.to(device, non_blocking=True) for name, tensor in self.buffers.items()}
        self.starts, self.lengths, self.room = (t.to(device) for t in (self.starts, self.lengths, self.room))

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is in memory, by name."""
        return {**self.buffers, "starts": self.starts, "lengths": self.lengths, "room": self.room}

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs, without the room."""
        flat = self._flat()
        return {**{name: tensor[flat] for name, tensor in self.buffers.items()}, "lengths": self.lengths.clone()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Hold what `state` has returned."""
        state = dict(state)
        self.lengths = state.pop("lengths")
        self._compact(state)

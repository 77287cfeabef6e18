"""All heads of a row hold the same number of entries: plain tensors with a little room at the end.

    keys     (rows, key heads, n + room, width)      a new token is written into the room; when there is
    values   (rows, key heads, n + room, width)      none left, the tensors grow by a 128th,
                                                     or twice as much if so many are to come before some go
    steps    (rows, 1 or key heads, n + room)        columns, mostly a byte for each; see `steps.py`

A row that holds less than the others begins with entries of column -1, the same number in all heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ext.cache.entries import NOTHING, Entries
from hf_ext.cache.stores.steps import columns_of, fits, joined, last_of, steps_after, steps_of

#: The room is so small a part of what is held, and no more than so many entries. There is none for less than one part:
#: a short cache is copied as quickly as it is written to.
PART, MOST_ROOM = 128, 256


class DenseStore:
    """Entries of one layer as plain tensors.

    Args:
        fields: names of the fields that entries carry.
        part: the room is the part of what is held that this is the denominator of.
    """

    ragged = False

    def __init__(self, fields: tuple[str, ...] = (), part: int = PART) -> None:
        self.field_names, self.part = fields, part
        self.length = 0
        #: Of each row, how many entries stand for nothing, so that attention needs a mask; empty if there are none.
        self.holes: list[int] = []
        self.buffers: dict[str, Tensor] = {}
        #: The last column of each head, a number if it is the same in all; None if it has to be looked up.
        self._last: Tensor | int | None = None
        #: The places of the room, keys and values, in the order in which they are filled; see `append_one`.
        self._room: list[tuple[Tensor, Tensor]] = []
        #: How many tokens will come one by one, as far as is known.
        self.expected = 0

    def __len__(self) -> int:
        return self.length

    def surplus(self, allowed: Sequence[int]) -> bool:
        """Tell whether some row holds more entries in each head than it is allowed."""
        if not self.holes:
            return self.length > min(allowed)
        return any(self.length - none > most for none, most in zip(self.holes, allowed, strict=True))

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        start: int,
        real: Tensor | None,
        fields: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add new tokens.

        Args:
            keys: `(rows, key heads, q, width)`.
            values: `(rows, key heads, q, value width)`.
            start: column of the first one.
            real: `(rows, q)` bool, False for padding; None if all are real.
            fields: `(rows, key heads, q, ...)` each, those of the new tokens that do not begin with 0.
        """
        rows, heads, count = keys.shape[:3]
        if real is not None:
            none = (~real).sum(1).tolist()
            self.holes = [a + b for a, b in zip(self.holes or [0] * rows, none, strict=True)]
        held = self.buffers.get("keys")
        last = NOTHING if held is None else self._last_column() if self._last is None else self._last
        # The newest token is the last one of every head, unless it is padding.
        self._last = start + count - 1 if real is None else None
        new: dict[str, Any] = {"keys": keys, "values": values, **(fields or {})}
        tracked = held is not None and (keys.requires_grad or held.requires_grad)
        room = 0 if held is None or tracked else held.shape[2] - self.length
        one = room >= count == 1 and real is None
        if one and isinstance(last, int) and fits(start - last, self.buffers["steps"]):
            new["steps"] = start - last
        else:
            new["steps"] = steps_after(last, start, count, rows, real, keys.device)
        if room < count:
            for name in self.field_names:
                new.setdefault(name, keys.new_zeros(rows, heads, count, dtype=torch.float32))
            if held is None:
                self.buffers = new
            else:
                extra = min((self.length + count) // self.part, MOST_ROOM)
                self._grow(new, 0 if tracked else max(extra, min(2 * extra, MOST_ROOM, self.expected - count)))
        else:
            self._write(new, count)
        self.length += count

    def append_one(self, keys: Tensor, values: Tensor, start: int) -> bool:
        """Add a real token if there is room that waits for the one after the last column; as `append` does.

        Such room says already that its step is 1 and its fields are 0.

        Returns:
            Whether it was added.
        """
        if not self._room or type(self._last) is not int or self._last != start - 1:
            return False
        key, value = self._room.pop()
        key.copy_(keys)
        value.copy_(values)
        self._last = start
        self.length += 1
        return True

    def _write(self, new: Mapping[str, Any], count: int) -> None:
        """Write new entries into the room: tensors, or one number for all; fields that are not given begin with 0."""
        del self._room[-count:]
        steps, more = self.buffers["steps"], new["steps"]
        if isinstance(more, Tensor) and (more.shape[1] > steps.shape[1] or more.itemsize > steps.itemsize):
            self.buffers["steps"] = joined(steps, more[:, :, :0])
        for name, buffer in self.buffers.items():
            place, found = buffer.narrow(2, self.length, count), new.get(name, 0)
            if isinstance(found, Tensor):
                place.copy_(found)
            else:
                place.fill_(found)

    def _last_column(self) -> Tensor | int:
        last = last_of(self._part("steps"))
        least, most = last.aminmax()
        return int(most) if bool(least == most) else last

    def _grow(self, new: Mapping[str, Tensor], extra: int) -> None:
        for name, tensor in new.items():
            old = self.buffers[name][:, :, : self.length]
            if name == "steps":
                self.buffers[name] = joined(old, tensor, extra)
                continue
            parts = [old, tensor.to(old.dtype)]
            if extra:
                parts.append(old.new_zeros(*old.shape[:2], extra, *old.shape[3:]))
            self.buffers[name] = torch.cat(parts, dim=2)
        self._room = []
        if extra:
            places = [self.buffers[name].narrow(2, -extra, extra).split(1, dim=2) for name in ("keys", "values")]
            self._room = list(zip(*places, strict=True))[::-1]

    def _part(self, name: str) -> Tensor:
        whole = self.buffers[name]
        return whole if whole.shape[2] == self.length else whole.narrow(2, 0, self.length)

    @property
    def keys(self) -> Tensor:
        """`(rows, key heads, n, width)`."""
        return self._part("keys")

    @property
    def values(self) -> Tensor:
        """`(rows, key heads, n, value width)`."""
        return self._part("values")

    @property
    def columns(self) -> Tensor:
        """`(rows, key heads, n)` int32."""
        return columns_of(self._part("steps"), self.buffers["keys"].shape[1])

    @property
    def bias(self) -> Tensor | None:
        """`(rows, key heads, n)` float32, what is added to the scores of the entries."""
        return self._part("bias") if "bias" in self.buffers else None

    def entries(self, seen: int, padding: Tensor) -> Entries:
        """Return what is held, keys and values as views."""
        fields = {name: self._part(name) for name in self.field_names}
        return Entries(self.keys, self.values, self.columns, seen, padding, fields)

    def note(self, fields: Mapping[str, Tensor]) -> None:
        """Replace fields of the entries."""
        for name, value in fields.items():
            self.buffers[name][:, :, : self.length] = value

    def add(self, name: str, numbers: Tensor) -> None:
        """Add numbers to a field of the entries, where it lies."""
        self._part(name).add_(numbers)

    def keep(self, index: Tensor, entries: Entries) -> None:
        """Hold only the entries at `index`, `(rows, key heads, k)`, -1 for nothing."""
        self.replace(entries.take(index))

    def replace(self, entries: Entries) -> None:
        """Hold these entries instead."""
        steps = steps_of(entries.columns)
        self.buffers = {"keys": entries.keys, "values": entries.values, "steps": steps, **entries.fields}
        self.length = len(entries)
        self._forget()
        self.settle()
        self._count_holes()

    def settle(self) -> None:
        """Stop holding on to more memory than the entries need."""
        for name, tensor in self.buffers.items():
            if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize or not tensor.is_contiguous():
                self.buffers[name] = tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()
                self._room = []

    def last_columns(self, count: int) -> Tensor:
        """Return the columns of the last `count` entries, `(rows, key heads, count)`."""
        return self.columns[:, :, self.length - count :]

    def drop_last(self, count: int) -> None:
        """Forget the last `count` entries of every head."""
        self.length -= count
        self._forget()

    def select(self, index: Tensor) -> None:
        """Go on with these rows."""
        self.buffers = {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self.buffers.items()}
        self._forget()
        self._count_holes()

    def repeat(self, times: int) -> None:
        """Repeat every row."""
        self.buffers = {name: tensor.repeat_interleave(times, dim=0) for name, tensor in self.buffers.items()}
        self._forget()
        self._count_holes()

    def to(self, device: torch.device | str) -> None:
        """Move everything to a device."""
        self.buffers = {name: tensor.to(device, non_blocking=True) for name, tensor in self.buffers.items()}
        self._room = []

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is in memory, by name."""
        return dict(self.buffers)

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs, without the room."""
        return {name: self._part(name).contiguous() for name in self.buffers}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Hold what `state` has returned."""
        self.buffers = dict(state)
        self.length = self.buffers["keys"].shape[2]
        self._forget()
        self._count_holes()

    def _forget(self) -> None:
        """Note that the last column has to be looked up, and that the room is not what `append_one` wants."""
        self._last, self._room = None, []

    def _count_holes(self) -> None:
        holes = (self._part("steps")[:, 0] == 0).sum(1).tolist()
        self.holes = holes if any(holes) else []

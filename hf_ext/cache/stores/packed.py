"""Older entries as codes of a few bits, the last ones as they are.

    |<-------- packed, in whole groups -------->|<--- recent: residual to residual + group - 1 --->|
    key codes   (rows, key heads, p + room, width * bits / 8)           a DenseStore
    key scale   (rows, key heads, (p + room) / group, width), and zero
    value codes (rows, key heads, p + room, value width * bits / 8)
    value scale (rows, key heads, p + room, value width / channels), and zero
    steps       (rows, 1 or key heads, p)       columns, see `steps.py`

Codes are only ever appended. What may still be dropped, merged or forgotten is what is not packed yet.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ext.cache.entries import NOTHING, Entries
from hf_ext.cache.quantisation import Quantisation, pack
from hf_ext.cache.stores.dense import DenseStore
from hf_ext.cache.stores.steps import columns_of, joined, last_of, steps_of
from hf_ext.kernels.packing import dequantise_keys, dequantise_values

#: What is packed of an entry; the second and third have a place for each group of tokens.
PARTS = ("key_codes", "key_scale", "key_zero", "value_codes", "value_scale", "value_zero")
BY_GROUP = ("key_scale", "key_zero")
#: The room behind recent entries is so small a part of them; they are few, and copied as often as it is full.
RECENT_PART = 32
#: What the names of packed tensors begin with where others stand beside them.
PREFIX = "packed."


class PackedStore:
    """Entries of one layer, those packed and those not.

    Args:
        fields: names of the fields that entries carry until they are packed; a bias stays with them.
        quantisation: bits and groups.
    """

    ragged = False

    def __init__(self, fields: tuple[str, ...], quantisation: Quantisation) -> None:
        self.quantisation = quantisation
        self.recent = DenseStore(fields, RECENT_PART)
        #: Entries of each head that are packed.
        self.frozen = 0
        self.packed: dict[str, Tensor] = {}
        self._none = False  # whether something packed stands for nothing

    def __len__(self) -> int:
        return self.frozen + len(self.recent)

    # What attention reads.

    def part(self, name: str) -> Tensor:
        """Return what is packed under a name, without the room."""
        whole = self.packed[name]
        used = self.frozen // self.quantisation.group if name in BY_GROUP else self.frozen
        return whole if whole.shape[2] == used else whole[:, :, :used]

    def codes(self) -> tuple[Tensor, ...]:
        """Return what `hf_ext.kernels.packed_attention` takes: codes, scale and zero of keys, and of values."""
        return tuple(self.part(name) for name in PARTS)

    def visible(self) -> Tensor | None:
        """Return which packed entries are real, `(rows, key heads, p)` bool; None if all are."""
        if not self._none:
            return None
        return (self.packed["steps"] != 0).expand(-1, self.packed["key_codes"].shape[1], -1)

    @property
    def packed_bias(self) -> Tensor | None:
        """`(rows, key heads, p)`, what is added to the scores of packed entries."""
        return self.part("bias") if "bias" in self.packed else None

    def dequantised(self) -> tuple[Tensor, Tensor]:
        """Return the packed keys and values as plain tensors."""
        codes, bits, dtype = self.codes(), self.quantisation.bits, self.recent.keys.dtype
        return (
            dequantise_keys(*codes[:3], bits=bits, dtype=dtype),
            dequantise_values(*codes[3:], bits=bits, dtype=dtype),
        )

    @property
    def keys(self) -> Tensor:
        """`(rows, key heads, n, width)`, packed ones dequantised: a copy if there are any."""
        return torch.cat([self.dequantised()[0], self.recent.keys], dim=2) if self.frozen else self.recent.keys

    @property
    def values(self) -> Tensor:
        """`(rows, key heads, n, value width)`, as `keys`."""
        return torch.cat([self.dequantised()[1], self.recent.values], dim=2) if self.frozen else self.recent.values

    @property
    def columns(self) -> Tensor:
        """`(rows, key heads, n)` int32."""
        if not self.frozen:
            return self.recent.columns
        heads = self.packed["key_codes"].shape[1]
        return torch.cat([columns_of(self.packed["steps"], heads), self.recent.columns], dim=2)

    @property
    def bias(self) -> Tensor | None:
        """`(rows, key heads, n)` float32, what is added to the scores of the entries."""
        old, new = self.packed_bias, self.recent.bias
        return new if old is None or new is None else torch.cat([old, new], dim=2)

    @property
    def holes(self) -> list[int]:
        """Of each row, how many entries stand for nothing; empty if none does."""
        rows = len(self.recent.keys) if self.recent.buffers else 0
        old = (self.packed["steps"][:, 0] == 0).sum(-1).tolist() if self._none else [0] * rows
        found = [a + b for a, b in zip(old, self.recent.holes or [0] * rows, strict=True)]
        return found if any(found) else []

    def scattered(self) -> bool:
        """Tell whether, in some row, entries that stand for nothing lie behind real ones that are packed."""
        if not self.frozen or not self.recent.holes:
            return False
        real = (self.packed["steps"][:, 0] != 0).any(-1).tolist()
        return any(there and none for there, none in zip(real, self.recent.holes, strict=True))

    # What the policy may still change.

    def entries(self, seen: int, padding: Tensor) -> Entries:
        """Return all that is held, packed entries dequantised; fields of packed entries are 0, but for their bias."""
        recent = self.open_entries(seen, padding)
        if not self.frozen:
            return recent
        old = {} if self.packed_bias is None else {"bias": self.packed_bias}
        fields = {
            name: torch.cat([old.get(name, value.new_zeros(*value.shape[:2], self.frozen)), value], dim=2)
            for name, value in recent.fields.items()
        }
        return dataclasses.replace(recent, keys=self.keys, values=self.values, columns=self.columns, fields=fields)

    def open_entries(self, seen: int, padding: Tensor) -> Entries:
        """Return what is not packed, as views."""
        return self.recent.entries(seen, padding)

    def surplus(self, allowed: Sequence[int]) -> bool:
        """Tell whether some row holds more entries in each head than it is allowed."""
        holes = self.holes or [0] * len(allowed)
        return any(len(self) - none > most for none, most in zip(holes, allowed, strict=True))

    def left(self, keep: Sequence[int]) -> list[int]:
        """Return how many entries that are not packed each row may keep, of so many in all.

        As many as stay in full precision may always be kept, so that what was packed early leaves a place for what is
        new.
        """
        if not self.frozen:
            return list(keep)
        packed = (self.packed["steps"][:, 0] != 0).sum(-1).tolist()
        least = max(min(self.quantisation.residual, len(self.recent)), 1)
        if any(most - used < least for most, used in zip(keep, packed, strict=True)):
            warnings.warn(
                "a quantised cache holds more than its budget: packed entries are never dropped, and with the window "
                "in full precision there are more of them",
                stacklevel=2,
            )
        return [max(most - used, least) for most, used in zip(keep, packed, strict=True)]

    def append(self, keys: Tensor, values: Tensor, start: int, real: Tensor | None) -> None:
        """Add new tokens; see `DenseStore.append`."""
        if not self.recent.buffers:
            self.quantisation.check_widths(keys.shape[-1], values.shape[-1])
        self.recent.append(keys, values, start, real)

    def note(self, fields: Mapping[str, Tensor]) -> None:
        """Replace fields of the entries that are not packed."""
        self.recent.note(fields)

    def keep(self, index: Tensor, entries: Entries) -> None:
        """Hold, of what is not packed, only the entries at `index`, `(rows, key heads, k)`, -1 for nothing."""
        self.recent.keep(index, entries)

    def replace(self, entries: Entries) -> None:
        """Hold these entries instead of those that are not packed."""
        self.recent.replace(entries)

    def settle(self) -> None:
        """Stop holding on to more memory than the entries need."""
        self.recent.settle()

    # Packing.

    def flush(self) -> None:
        """Pack the oldest of the recent entries, as far as there are more than enough."""
        count = self.quantisation.packed_of(len(self.recent))
        if not count:
            return
        entries = self.recent.entries(0, torch.zeros(0))
        old = entries.map(lambda tensor: tensor[:, :, :count])
        none = not bool(old.real.all())
        with torch.no_grad():
            keys, values = pack(old.keys, old.values, old.real if none else None, self.quantisation)
            new = dict(zip(PARTS, (*keys, *values), strict=True))
            if "bias" in old.fields:
                new["bias"] = old.fields["bias"]
            for name, tensor in new.items():
                self._append(name, tensor)
        steps = self.packed.get("steps")
        before = None if steps is None else last_of(steps).expand(-1, keys[0].shape[1])
        more = steps_of(old.columns, before)
        self.packed["steps"] = more if steps is None else joined(steps, more)
        self.frozen += count
        self._none |= none
        self.recent.replace(entries.map(lambda tensor: tensor[:, :, count:]))

    def _append(self, name: str, new: Tensor) -> None:
        """Write new packed tensors behind the others; when there is no room, they move to where there is more."""
        groups = self.frozen // self.quantisation.group
        used, room = groups, groups // 64
        if name not in BY_GROUP:
            used, room = used * self.quantisation.group, room * self.quantisation.group
        old = self.packed.get(name)
        if old is None:
            self.packed[name] = new.contiguous()
        elif old.shape[2] >= used + new.shape[2]:
            old[:, :, used : used + new.shape[2]] = new
        else:
            spare = new.new_zeros(*new.shape[:2], room, *new.shape[3:])
            self.packed[name] = torch.cat([old[:, :, :used], new, spare], dim=2)

    # What moves rows and memory.

    def last_columns(self, count: int) -> Tensor:
        """Return the columns of the last `count` entries, `(rows, key heads, count)`, -1 for packed ones."""
        missing = max(count - len(self.recent), 0)
        found = self.recent.last_columns(count - missing)
        return torch.nn.functional.pad(found, (missing, 0), value=NOTHING)

    def drop_last(self, count: int) -> None:
        """Forget the last `count` entries of every head, none of which is packed."""
        self.recent.drop_last(count)

    def select(self, index: Tensor) -> None:
        """Go on with these rows."""
        self.packed = {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self.packed.items()}
        self._none = self._none and bool((self.packed["steps"] == 0).any())
        self.recent.select(index)

    def repeat(self, times: int) -> None:
        """Repeat every row."""
        self.packed = {name: tensor.repeat_interleave(times, dim=0) for name, tensor in self.packed.items()}
        self.recent.repeat(times)

    def to(self, device: torch.device | str) -> None:
        """Move everything to a device."""
        self.packed = {name: tensor.to(device, non_blocking=True) for name, tensor in self.packed.items()}
        self.recent.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is in memory, by name."""
        return {**{PREFIX + name: tensor for name, tensor in self.packed.items()}, **self.recent.tensors()}

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs, without the room."""
        packed = {name: self.packed[name] if name == "steps" else self.part(name) for name in self.packed}
        return {**{PREFIX + name: t.contiguous() for name, t in packed.items()}, **self.recent.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Hold what `state` has returned."""
        self.packed = {name.removeprefix(PREFIX): t for name, t in state.items() if name.startswith(PREFIX)}
        self.recent.restore({name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)})
        self.frozen = self.packed["steps"].shape[2] if self.packed else 0
        self._none = bool(self.packed) and bool((self.packed["steps"] == 0).any())

    def nominal_bytes(self, allowed: Sequence[int]) -> int:
        """Return the bytes of codes, scales, zeros and recent entries of rows that hold so many entries."""
        keys, values = self.recent.buffers["keys"], self.recent.buffers["values"]
        width, value_width, heads = keys.shape[-1], values.shape[-1], keys.shape[1]
        bits = self.quantisation.entry_bits(width, value_width, keys.itemsize)
        total = 0.0
        for tokens in allowed:
            packed = self.quantisation.packed_of(tokens)
            total += packed * bits / 8 + (tokens - packed) * (width * keys.itemsize + value_width * values.itemsize)
        return round(heads * total)

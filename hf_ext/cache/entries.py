"""What one layer of a cache holds, as policies see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

#: Column of an entry that stands for nothing: padding, or the front of a row that holds less than others.
NOTHING = -1


@dataclass(frozen=True)
class Entries:
    """Keys and values of one layer, in the order of their columns.

    A column is the number of a token in its row, padding counted; it is what `cache_position` was. A head
    may hold other columns than its neighbour. Where heads or rows hold different numbers of entries, the
    shorter ones begin with entries of column `NOTHING`.

    Args:
        keys: `(rows, key heads, n, width)`, after the rotation by their position if the model rotates.
        values: `(rows, key heads, n, value width)`.
        columns: `(rows, key heads, n)` int32, ascending, `NOTHING` for what no query sees.
        fields: further numbers of each entry, `(rows, key heads, n)` each, by name. They follow their entry
            wherever it goes.
        seen: tokens that the layer has seen, dropped ones and padding included.
        padding: `(rows,)` int64, how many of the columns seen were padding.
    """

    keys: Tensor
    values: Tensor
    columns: Tensor
    seen: int
    padding: Tensor
    fields: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def real(self) -> Tensor:
        """`(rows, key heads, n)` bool, False for entries that stand for nothing."""
        return self.columns >= 0

    @property
    def age(self) -> Tensor:
        """`(rows, key heads, n)`, how many tokens came after each entry; 0 for the last one."""
        return self.seen - 1 - self.columns

    @property
    def tokens(self) -> Tensor:
        """`(rows,)` int64, how many real tokens each row has seen."""
        return self.seen - self.padding

    def __len__(self) -> int:
        return self.columns.shape[-1]

    def map(self, change: Callable[[Tensor], Tensor]) -> Entries:
        """Return the entries with every tensor of them, and the padding, changed alike."""
        return dataclasses.replace(
            self,
            keys=change(self.keys),
            values=change(self.values),
            columns=change(self.columns),
            fields={name: change(value) for name, value in self.fields.items()},
        )

    def take(self, index: Tensor) -> Entries:
        """Return some of the entries.

        Args:
            index: `(rows, key heads, k)` int64 into the entries, ascending, -1 for nothing.

        Example:
            >>> import torch
            >>> keys = torch.arange(3.0).view(1, 1, 3, 1)
            >>> entries = Entries(keys, keys, torch.arange(3).view(1, 1, 3), 3, torch.zeros(1))
            >>> entries.take(torch.tensor([[[-1, 0, 2]]])).columns
            tensor([[[-1,  0,  2]]])
        """
        from hf_ext.cache.ops import compact

        names = list(self.fields)
        keys, values, columns, *fields = compact(
            [self.keys, self.values, self.columns, *(self.fields[name] for name in names)], index
        )
        return dataclasses.replace(
            self, keys=keys, values=values, columns=columns, fields=dict(zip(names, fields, strict=True))
        )

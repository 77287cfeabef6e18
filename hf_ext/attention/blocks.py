"""What a kernel needs of an attention structure: fields side by side, and which blocks are worth a look.

A block is `size` queries times `size` keys. From the least and greatest value of each field in it, without looking
at its pairs, it is known to be *empty* (nobody sees anybody: skipped), *full* (everybody sees everybody: no mask is
evaluated) or neither (*partial*: the fields decide pair by pair). The bounds are conservative: a block may be called
partial without need, never empty or full. Nothing here waits for the device, and nothing is larger than the number
of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from hf_ext.attention.structure import AttentionStructure, Tokens

EMPTY, PARTIAL, FULL = 0, 1, 2

#: Greater than any field, lesser when negated.
_FAR = 2**40


@dataclass(frozen=True)
class BlockTable:
    """For each block of one side, the blocks of the other that it has to look at.

    Args:
        indices: `(rows, blocks, others)` int32: first the full ones, then the partial ones, then what is not
            looked at; each in ascending order.
        counts: `(rows, blocks, 2)` int32: how many are full, how many are full or partial.
    """

    indices: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, classes: torch.Tensor) -> BlockTable:
        """Return the table of `(rows, blocks, others)` classes."""
        indices = classes.contiguous().sort(dim=-1, descending=True, stable=True).indices.int()
        counts = torch.stack([(classes == FULL).sum(-1), (classes != EMPTY).sum(-1)], dim=-1).int()
        return cls(indices, counts)

    def classes(self) -> torch.Tensor:
        """Return `(rows, blocks, others)` int8, the classes that the table was made of."""
        place = torch.arange(self.indices.shape[-1], device=self.indices.device)
        full, looked_at = self.counts[..., :1], self.counts[..., 1:]
        sorted_classes = torch.where(place < full, FULL, torch.where(place < looked_at, PARTIAL, EMPTY))
        return torch.zeros_like(sorted_classes).scatter(-1, self.indices.long(), sorted_classes).to(torch.int8)


@dataclass(frozen=True)
class KernelArguments:
    """A structure as kernels read it; made by `kernel_arguments`, once for all layers of a forward pass.

    Args:
        queries: `(rows, 4, queries)` int32: order, position, group, segment.
        keys: `(rows, 5, keys)` int32: order, position, group, segment, node.
        ancestors: `(rows, queries, words)` int64.
        window: as in the structure, 0 without.
        groups: whether group and segment are looked at.
        tree: 0 without a tree, 1 if its nodes fit into one word, 2 otherwise.
        size: queries and keys of a block.
        by_query: the key blocks of each block of queries.
        by_key: the query blocks of each block of keys; the backward pass and column sums go this way.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    ancestors: torch.Tensor
    window: int
    groups: bool
    tree: int
    size: int
    by_query: BlockTable
    by_key: BlockTable

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows (1 where all agree), queries and keys."""
        return self.queries.shape[0], self.queries.shape[-1], self.keys.shape[-1]

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors in the order in which the operators take them."""
        tables = (self.by_query, self.by_key)
        return [
            self.queries,
            self.keys,
            self.ancestors,
            *(t for table in tables for t in (table.indices, table.counts)),
        ]

    def structure(self) -> AttentionStructure:
        """Return the structure that these arguments say, without its blocks."""
        q, k = self.queries.unbind(1), self.keys.unbind(1)
        return AttentionStructure(
            Tokens(*q) if self.groups else Tokens(*q[:2]),
            Tokens(*k[:4]) if self.groups else Tokens(*k[:2]),
            window=self.window or None,
            nodes=k[4] if self.tree else None,
            ancestors=self.ancestors if self.tree else None,
        )

    def dense(self) -> torch.Tensor:
        """Return `(rows, 1, queries, keys)` bool as the kernels find it: fields only where a block is partial."""
        _, queries, keys = self.shape
        classes = self.by_query.classes().repeat_interleave(self.size, 1).repeat_interleave(self.size, 2)
        classes = classes[:, None, :queries, :keys]
        return (classes == FULL) | ((classes == PARTIAL) & self.structure().dense())

    def last(self, count: int) -> KernelArguments:
        """Return the arguments of the last `count` queries with the same keys."""
        structure = self.structure()
        ancestors = None if structure.ancestors is None else structure.ancestors[:, -count:]
        part = AttentionStructure(
            structure.queries.map(lambda field: field[:, -count:]),
            structure.keys,
            structure.window,
            structure.nodes,
            ancestors,
        )
        return kernel_arguments(part, self.size)


def kernel_arguments(structure: AttentionStructure, size: int = 128) -> KernelArguments:
    """Return a structure as kernels read it.

    Args:
        structure: who sees whom.
        size: queries and keys of a block, a power of two. What the kernels work on at a time divides it.

    Raises:
        ValueError: a size that is no power of two.

    Example:
        >>> arguments = kernel_arguments(AttentionStructure.causal(torch.ones(1, 6)).windowed(2), size=2)
        >>> arguments.by_query.classes()[0]
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int8)
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"size must be a power of two, got {size}")
    rows = structure.shape[0]
    q, k = structure.queries, structure.keys
    tree = 0 if structure.ancestors is None else 1 if structure.ancestors.shape[-1] == 1 else 2
    ancestors = structure.ancestors
    if ancestors is None:
        ancestors = torch.zeros(1, 1, 1, dtype=torch.int64, device=structure.device)
    queries = _stacked(rows, [q.order, q.position, q.group, q.segment])
    keys = _stacked(rows, [k.order, k.position, k.group, k.segment, structure.nodes])
    found = classes(structure, size)
    return KernelArguments(
        queries=queries,
        keys=keys,
        ancestors=ancestors.expand(rows, -1, -1).contiguous(),
        window=structure.window or 0,
        groups=q.group is not None,
        tree=tree,
        size=size,
        by_query=BlockTable.of(found),
        by_key=BlockTable.of(found.transpose(1, 2)),
    )


def classes(structure: AttentionStructure, size: int) -> torch.Tensor:
    """Return `(rows, query blocks, key blocks)` int8: EMPTY, PARTIAL or FULL.

    Args:
        structure: who sees whom.
        size: queries and keys of a block.
    """
    rows = structure.shape[0]
    q = structure.queries.map(lambda field: field.expand(rows, -1))
    k = structure.keys.map(lambda field: field.expand(rows, -1))
    # Who sees nothing, or is seen by nobody, cannot keep a block from being empty.
    awake = q.order >= k.order.amin(-1, keepdim=True)
    shown = k.order <= q.order.amax(-1, keepdim=True)

    lowest, _ = _bounds(q.order, size)
    first, _ = _bounds(k.order, size, shown)
    full = _bounds(k.order, size)[1][:, None, :] <= lowest[:, :, None]
    empty = first[:, None, :] > _bounds(q.order, size, awake)[1][:, :, None]
    if structure.window is not None:
        _, highest = _bounds(q.position, size)
        first, _ = _bounds(k.position, size)
        full &= highest[:, :, None] - first[:, None, :] < structure.window
        lowest, _ = _bounds(q.position, size, awake)
        _, last = _bounds(k.position, size, shown)
        empty |= lowest[:, :, None] - last[:, None, :] >= structure.window
    if q.group is not None and k.group is not None and q.segment is not None and k.segment is not None:
        strangers = _strangers(q.group, q.segment, k.group, k.segment, size)
        full &= strangers
        empty |= _siblings(q, k, awake, shown, size)
    if structure.nodes is not None:
        nodes = structure.nodes.expand(rows, -1)
        full &= (_bounds(nodes, size)[1] < 0)[:, None, :]
    if len(structure.keys) % size:
        full[:, :, -1] = False  # what lies behind the last key is seen by nobody
    return torch.where(empty, EMPTY, torch.where(full, FULL, PARTIAL)).to(torch.int8)


def is_plain_causal(structure: AttentionStructure) -> bool:
    """Return whether a structure says no more than that the last queries see what is before them.

    A kernel needs no fields for it. Waits for the device once.

    Args:
        structure: who sees whom.

    Example:
        >>> is_plain_causal(AttentionStructure.causal(torch.ones(2, 4)).part(2, 4))
        True
        >>> is_plain_causal(AttentionStructure.causal(torch.tensor([[0, 1]])))
        False
    """
    _, queries, keys = structure.shape
    if structure.queries.group is not None or structure.nodes is not None or queries > keys:
        return False
    line = torch.arange(keys, dtype=torch.int32, device=structure.device)
    wrong = (structure.keys.order != line).any() | (structure.queries.order != line[keys - queries :]).any()
    if structure.window is not None:
        wrong |= (structure.keys.position != line).any() | (structure.queries.position != line[keys - queries :]).any()
    return not bool(wrong)


def _stacked(rows: int, fields: list[torch.Tensor | None]) -> torch.Tensor:
    some = next(field for field in fields if field is not None)
    nothing = torch.zeros_like(some)
    return torch.stack([(nothing if field is None else field).expand(rows, -1) for field in fields], dim=1)


def _bounds(field: torch.Tensor, size: int, among: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the greatest value of each block, `(rows, blocks)`; the other way round if there is none."""
    low = high = field = field.long()
    if among is not None:
        low, high = torch.where(among, field, _FAR), torch.where(among, field, -_FAR)
    more = -field.shape[-1] % size
    low = pad(low, (0, more), value=_FAR).unflatten(-1, (-1, size)).amin(-1)
    high = pad(high, (0, more), value=-_FAR).unflatten(-1, (-1, size)).amax(-1)
    return low, high


def _strangers(
    q_group: torch.Tensor, q_segment: torch.Tensor, k_group: torch.Tensor, k_segment: torch.Tensor, size: int
) -> torch.Tensor:
    """Return where no query can be hidden from a key by groups: other groups, or one and the same segment."""
    q_low, q_high = _bounds(q_group, size, q_group > 0)
    k_low, k_high = _bounds(k_group, size, k_group > 0)
    apart = (q_high[:, :, None] < k_low[:, None, :]) | (q_low[:, :, None] > k_high[:, None, :])
    q_first, q_last = _bounds(q_segment, size, q_group > 0)
    k_first, k_last = _bounds(k_segment, size, k_group > 0)
    one = (q_first == q_last)[:, :, None] & (k_first == k_last)[:, None, :]
    return apart | (one & (q_first[:, :, None] == k_first[:, None, :]))


def _siblings(q: Tokens, k: Tokens, awake: torch.Tensor, shown: torch.Tensor, size: int) -> torch.Tensor:
    """Return where all queries are hidden from all keys: one group, and segments that do not meet."""
    assert q.group is not None
    assert k.group is not None
    assert q.segment is not None
    assert k.segment is not None
    q_low, q_high = _bounds(q.group, size, awake)
    k_low, k_high = _bounds(k.group, size, shown)
    same = ((q_low == q_high) & (q_low > 0))[:, :, None] & (k_low == k_high)[:, None, :]
    same &= q_low[:, :, None] == k_low[:, None, :]
    q_first, q_last = _bounds(q.segment, size, awake)
    k_first, k_last = _bounds(k.segment, size, shown)
    return same & ((q_last[:, :, None] < k_first[:, None, :]) | (q_first[:, :, None] > k_last[:, None, :]))


__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "BlockTable",
    "KernelArguments",
    "classes",
    "is_plain_causal",
    "kernel_arguments",
]

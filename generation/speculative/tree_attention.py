"""Who sees whom in a forward pass over draft trees, as a structure and as what a backend can read.

Every lane attends to its own context and, inside its tree, to the nodes above. The structure is a
handful of integers; `mask_for` turns it into the form that the model's attention implementation
takes. Steps are short, so the dense forms are made from these integers directly; all others go
through `AttentionStructure`. A backend that understands trees registers itself with `register`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_ext import adapter
from hf_ext.attention.masks import block_mask
from hf_ext.attention.mode import runs_kernels
from hf_ext.attention.packed import pack
from hf_ext.attention.structure import NEVER, AttentionStructure, Tokens


@dataclass(frozen=True)
class TreeStructure:
    """Queries of a forward pass that hang in trees behind the cached context of each lane.

    The keys of lane `r` are its context, `columns[r]` of them, then its tree so far (`earlier` nodes
    of calls before this one and then the queries). Keys after that belong to nothing.

    Args:
        lengths: tokens of context of each lane; the first query level has this position.
        columns: columns that the context takes in the cache, less than `lengths` where a
            sliding-window layer has dropped some.
        parents: for every lane the parents of all nodes of its tree, the queries last; -1 for the context.
        depths: likewise the distance of each node from the context, 0 on the first level.
        ancestors: `(lanes or 1, queries, nodes)` bool; one for all if the lanes have equal trees.
        queries: number of queries; they are the last nodes.
        keys: columns that the keys have.
        window: a query sees keys that are less than this many positions before it; None for all.
    """

    lengths: tuple[int, ...]
    columns: tuple[int, ...]
    parents: tuple[tuple[int, ...], ...]
    depths: tuple[tuple[int, ...], ...]
    ancestors: np.ndarray
    queries: int
    keys: int
    window: int | None = None

    @property
    def is_causal(self) -> bool:
        """Whether plain causal attention over all keys is the same."""
        even = len(set(self.columns)) == 1 and self.keys == self.columns[0] + len(self.parents[0])
        chains = all(parent == node - 1 for row in set(self.parents) for node, parent in enumerate(row))
        return even and chains and not self._window_binds

    @property
    def _window_binds(self) -> bool:
        if self.window is None:
            return False
        return any(n + max(d, default=0) - (n - c) >= self.window
                   for n, c, d in zip(self.lengths, self.columns, self.depths, strict=True))  # fmt: skip

    def ancestor_bits(self) -> np.ndarray:
        """Return the ancestors as `(lanes or 1, queries, words)` uint64; node `j` is bit `j % 64` of word `j // 64`.

        Example:
            >>> structure_of((3,), (3,), [(-1, 0, 0)], queries=3, keys=6).ancestor_bits().tolist()
            [[[1], [3], [5]]]
        """
        nodes = self.ancestors.shape[-1]
        padded = np.pad(self.ancestors, ((0, 0), (0, 0), (0, -nodes % 64)))
        words = padded.reshape(*padded.shape[:2], -1, 64).astype(np.uint64)
        return (words << np.arange(64, dtype=np.uint64)).sum(-1, dtype=np.uint64)

    def structure(self) -> AttentionStructure:
        """Return the same for every backend, on the CPU.

        Example:
            >>> structure_of((2,), (2,), [(-1, 0, 0)], queries=2, keys=5).structure().dense().int()[0, 0]
            tensor([[1, 1, 1, 1, 0],
                    [1, 1, 1, 0, 1]], dtype=torch.int32)
        """
        lengths, columns = np.array(self.lengths)[:, None], np.array(self.columns)[:, None]
        depths = np.array(self.depths)
        nodes = depths.shape[1]
        place = np.arange(self.keys)
        number = place - columns  # of the node that a key is
        inside = (number >= 0) & (number < nodes)
        node = np.where(inside, number, -1)
        below = np.take_along_axis(depths, np.where(inside, number, 0), axis=1)
        position = np.where(inside, lengths + below, lengths + number)
        order = columns + np.arange(nodes - self.queries, nodes)

        def tensor(field: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(field, dtype=np.int32))

        return AttentionStructure(
            Tokens(tensor(order), tensor(lengths + depths[:, nodes - self.queries :])),
            Tokens(tensor(np.where(number < nodes, place, NEVER)), tensor(position)),
            window=self.window,
            nodes=tensor(node),
            ancestors=torch.from_numpy(self.ancestor_bits().view(np.int64)),
        )

    def dense(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the mask as `(lanes, 1, queries, keys)` bool, True where a query sees a key."""
        tree = torch.from_numpy(self._windowed_ancestors()).to(device)
        if (
            len(set(self.columns)) == 1
            and len(set(self.lengths)) == 1
            and self.keys == self.columns[0] + tree.shape[-1]
        ):
            dense = torch.cat([self._even_context(tree.shape[0], device), tree], dim=2)
            return dense[:, None].expand(len(self.columns), -1, -1, -1)
        columns = torch.tensor(self.columns, device=device)[:, None, None]
        number = torch.arange(self.keys, device=device) - columns  # (lanes, 1, keys), of the node
        nodes = tree.shape[-1]
        none = torch.zeros(*tree.shape[:2], 1, dtype=torch.bool, device=device)
        tree = torch.cat([tree, none], dim=2).expand(len(self.columns), -1, -1)
        at = torch.where((number >= 0) & (number < nodes), number, nodes).expand(-1, self.queries, -1)
        visible = tree.gather(2, at)
        context = number < 0
        if self._window_binds and self.window is not None:
            depths = torch.tensor([row[-self.queries :] for row in self.depths], device=device)
            context = context & (depths[:, :, None] - number < self.window)
        return (visible | context)[:, None]

    def _windowed_ancestors(self) -> np.ndarray:
        if not self._window_binds or self.window is None:
            return np.array(self.ancestors, order="C")  # a shape's own may not be written: torch would warn
        depths = np.array(self.depths if self.ancestors.shape[0] > 1 else self.depths[:1])
        near = depths[:, -self.queries :, None] - depths[:, None, :] < self.window
        return self.ancestors & near

    def _even_context(self, lanes: int, device: torch.device | str) -> torch.Tensor:
        columns = self.columns[0]
        if not self._window_binds or self.window is None:
            return torch.ones(lanes, self.queries, columns, dtype=torch.bool, device=device)
        depths = torch.tensor(
            [row[-self.queries :] for row in (self.depths if lanes > 1 else self.depths[:1])], device=device
        )
        distance = columns - torch.arange(columns, device=device)  # from a query of depth 0
        return depths[:, :, None] + distance < self.window


def structure_of(
    lengths: tuple[int, ...],
    columns: tuple[int, ...],
    parents: list[tuple[int, ...]],
    *,
    queries: int,
    keys: int,
    window: int | None = None,
) -> TreeStructure:
    """Build the structure of a forward pass from the parents of each lane's tree.

    Args:
        lengths: tokens of context of each lane.
        columns: columns that the context takes in the cache.
        parents: parents of all nodes of each tree, the queries last.
        queries: how many nodes are queries.
        keys: columns that the keys have.
        window: of a sliding-window layer.

    Example:
        >>> structure_of((2,), (2,), [(-1, 0, 0)], queries=2, keys=5).dense().int()[0, 0]
        tensor([[1, 1, 1, 1, 0],
                [1, 1, 1, 0, 1]], dtype=torch.int32)
    """
    from hf_ext.generation.speculative.tree import shape_of

    shapes = [shape_of(p) for p in parents]
    if all(shape is shapes[0] for shape in shapes):
        ancestors = shapes[0].ancestors[None, -queries:]
    else:
        ancestors = np.stack([shape.ancestors[-queries:] for shape in shapes])
    levels = tuple(shape.levels for shape in shapes)
    return TreeStructure(lengths, columns, tuple(parents), levels, ancestors, queries, keys, window)


#: What turns a structure into the `attention_mask` of one attention implementation.
Builder = Callable[[TreeStructure, torch.dtype, torch.device], Any]
_BUILDERS: dict[str, Builder] = {}


def register(implementation: str, build: Builder) -> None:
    """Let an attention implementation read draft trees in its own form.

    Args:
        implementation: the name given as `attn_implementation`.
        build: makes, from a structure, the model's dtype and its device, what the implementation
            takes as `attention_mask` (the structure itself, if it likes).
    """
    _BUILDERS[implementation] = build


def mask_for(implementation: str, structure: TreeStructure, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the attention mask of a forward pass in the form that the implementation takes.

    Raises:
        ValueError: the implementation cannot express trees.
    """
    build = _BUILDERS.get(implementation)
    if build is None:  # another name for one of them: what takes the same masks takes the same trees
        build = _BUILDERS.get(adapter.masks_like(implementation, _BUILDERS) or "")
    if build is not None:
        return build(structure, dtype, device)
    if structure.is_causal:
        return None
    raise ValueError(
        f"attn_implementation={implementation!r} takes no mask for draft trees or for rows of different lengths; load "
        f"the model with one of {', '.join(sorted(_BUILDERS))}, or decode one row at a time with a drafter of chains"
    )


def _boolean(structure: TreeStructure, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    if structure.queries == 1 and structure.is_causal:
        return None  # a single query that sees all keys needs no mask
    return structure.dense(device)


def _additive(structure: TreeStructure, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    dense = structure.dense(device)
    return torch.zeros(dense.shape, dtype=dtype, device=device).masked_fill_(~dense, torch.finfo(dtype).min)


def _block_mask(structure: TreeStructure, dtype: torch.dtype, device: torch.device) -> Any:
    return block_mask(structure.structure(), dtype, device)


def _compact(structure: TreeStructure, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    if structure.queries == 1 or not runs_kernels(device):
        return _boolean(structure, dtype, device)
    # Packed before it is moved: one copy to the device, not one for every field.
    return pack(structure.structure()).to(device, non_blocking=True)


register("sdpa", _boolean)
register("eager", _additive)
register("flex_attention", _block_mask)
register("hf_ext", _compact)

"""Who may see whom in attention, and at which position, as a few integers for every token.

    field       a query sees a key if ...
    order       key.order <= query.order: causal with the token's number, bidirectional where tokens share one
    group,      not (both in the same group and in different segments): siblings do not see each other, what
    segment     stands outside of their group (group 0 is no group) sees all of them and is seen by them
    node,       the key is no node of a tree (node < 0), or the query's bit of that node is set
    ancestors
    position    query.position - key.position < window, if there is one; also what rotary embeddings use

All of them must hold. Padding has an order that no query reaches. Every field is a small tensor of shape
`(rows, tokens)`, one row for all of a batch where they agree, so that composing structures is arithmetic
on integers, and nothing of size queries times keys exists until a backend asks for `dense`.

    prefix | option a | option b | suffix          order    0 1 | 2 3 4 | 5 6 | 7 8
    P  P   | a  a  a  | b  b     | S  S            position 0 1 | 2 3 4 | 2 3 | 5 6
                                                   group    0 0 | 1 1 1 | 1 1 | 0 0
                                                   segment  0 0 | 1 1 1 | 2 2 | 0 0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: The order of padding: no query reaches it.
NEVER = 2**31 - 1


@dataclass(frozen=True)
class Tokens:
    """The fields of one side of attention.

    Args:
        order: `(rows, tokens)` int32; `NEVER` for padding.
        position: `(rows, tokens)` int32.
        group: `(rows, tokens)` int32, 0 outside of groups; None if there are none.
        segment: `(rows, tokens)` int32, looked at inside of groups; None if there are none.
    """

    order: torch.Tensor
    position: torch.Tensor
    group: torch.Tensor | None = None
    segment: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self.named().items():
            if value.ndim != 2 or value.dtype != torch.int32 or value.shape[-1] != self.order.shape[-1]:
                raise ValueError(
                    f"{name} must be int32 of shape (rows, {self.order.shape[-1]}), got {value.dtype} of shape "
                    f"{tuple(value.shape)}"
                )
        if (self.group is None) != (self.segment is None):
            raise ValueError("group and segment belong together: give both or neither")

    def named(self) -> dict[str, torch.Tensor]:
        """Return the fields there are, by name."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Tokens:
        """Return the tokens with every field changed alike (sliced, moved to a device)."""
        return Tokens(**{name: change(value) for name, value in self.named().items()})

    def __len__(self) -> int:
        return self.order.shape[-1]


@dataclass(frozen=True)
class AttentionStructure:
    """Who sees whom between some queries and some keys; see the module's head for the rules.

    Structures are made by `causal`, `bidirectional` and `tree`, and composed by `spans`, `segments`,
    `documents`, `windowed` and `extended`. None of them changes a structure; each returns a new one.

    Args:
        queries: fields of the queries.
        keys: fields of the keys.
        window: a query sees keys that are less than this many positions before it; None for all.
        nodes: `(rows, keys)` int32, the number of each key in its row's tree, -1 outside; None without a tree.
        ancestors: `(rows, queries, words)` int64, the nodes that a query sees; node `j` is bit `j % 64` of
            word `j // 64`.

    Raises:
        ValueError: fields of other shapes or dtypes.

    Example:
        >>> AttentionStructure.causal(torch.tensor([[0, 1, 1]])).dense()[0, 0].int()
        tensor([[0, 0, 0],
                [0, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """

    queries: Tokens
    keys: Tokens
    window: int | None = None
    nodes: torch.Tensor | None = None
    ancestors: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and (isinstance(self.window, float) or self.window < 1):
            raise ValueError(f"window must be an int of at least 1, got {self.window}")
        if (self.nodes is None) != (self.ancestors is None):
            raise ValueError("nodes and ancestors belong together: give both or neither")
        if (self.queries.group is None) != (self.keys.group is None):
            raise ValueError("queries and keys must both have groups, or neither")
        if self.nodes is not None and self.ancestors is not None:
            if self.nodes.shape[-1] != len(self.keys) or self.nodes.dtype != torch.int32:
                raise ValueError(f"nodes must be int32 of shape (rows, {len(self.keys)}), got {self.nodes.shape}")
            if self.ancestors.ndim != 3 or self.ancestors.shape[1] != len(self.queries):
                raise ValueError(
                    f"ancestors must have the shape (rows, {len(self.queries)}, words), got "
                    f"{tuple(self.ancestors.shape)}"
                )

    # How structures begin

    @classmethod
    def causal(cls, mask: torch.Tensor) -> AttentionStructure:
        """Return plain causal attention of every row with itself.

        Args:
            mask: `(rows, tokens)` bool or int, 0 on padding (on either side).
        """
        if mask.ndim != 2:
            raise ValueError(f"mask must have the shape (rows, tokens), got {tuple(mask.shape)}")
        real = mask.bool()
        order = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device).expand(mask.shape)
        position = (real.int().cumsum(-1, dtype=torch.int32) - 1).clamp_min(0)
        tokens = Tokens(order.masked_fill(~real, NEVER), position)
        return cls(_awake(tokens), tokens)

    @classmethod
    def bidirectional(cls, mask: torch.Tensor) -> AttentionStructure:
        """Return attention in which all tokens of a row see each other.

        Args:
            mask: `(rows, tokens)` bool or int, 0 on padding.
        """
        return cls.causal(mask).spans(torch.ones_like(mask, dtype=torch.int32))

    @classmethod
    def tree(cls, context: torch.Tensor, parents: list[list[int]]) -> AttentionStructure:
        """Return draft trees, one a row, whose nodes see the row's context and the nodes above them.

        Args:
            context: `(rows, tokens)` bool or int, 0 on padding; the tokens that all nodes see.
            parents: for every row the parent of each node, which comes before it, -1 for the context.

        Example:
            >>> AttentionStructure.tree(torch.ones(1, 1), [[-1, -1, 0]]).dense()[0, 0].int()
            tensor([[1, 1, 0, 0],
                    [1, 0, 1, 0],
                    [1, 1, 0, 1]], dtype=torch.int32)
        """
        count, device = len(parents[0]), context.device
        if len(parents) != len(context) or any(len(row) != count for row in parents):
            raise ValueError(f"expected {len(context)} rows of {count} parents, got {list(map(len, parents))}")
        words = -(-max(count, 1) // 64)
        bits = torch.zeros(len(parents), count, words, dtype=torch.int64)
        depths = torch.zeros(len(parents), count, dtype=torch.int32)
        for row, above in enumerate(parents):
            for node, parent in enumerate(above):
                if not -1 <= parent < node:
                    raise ValueError(f"a node must come after its parent, got parents {above}")
                if parent >= 0:
                    bits[row, node] = bits[row, parent]
                    depths[row, node] = depths[row, parent] + 1
                bits[row, node, node // 64] |= _bit(node % 64)
        all_keys = torch.cat([context.bool(), context.new_ones(len(parents), count).bool()], dim=1)
        base = cls.causal(all_keys)
        columns = context.shape[1]
        length = context.bool().sum(-1, keepdim=True, dtype=torch.int32)
        position = base.keys.position.clone()
        position[:, columns:] = length + depths.to(device)
        nodes = torch.full_like(position, -1)
        nodes[:, columns:] = torch.arange(count, dtype=torch.int32, device=device)
        keys = dataclasses.replace(base.keys, position=position)
        queries = keys.map(lambda field: field[:, columns:])
        return cls(queries, keys, nodes=nodes, ancestors=bits.to(device))

    # How they are composed

    def spans(self, spans: torch.Tensor) -> AttentionStructure:
        """Let the tokens of a span see each other; what comes before or after it stays as it is.

        Args:
            spans: `(rows, tokens)` int, the same number from 1 on for the tokens of a span, which stand
                side by side (padding aside); 0 outside of spans. Prefix language models have one span at the
                beginning, block-causal attention has nothing but spans.

        Raises:
            ValueError: a span in pieces, or queries that are not the keys.

        Example:
            >>> AttentionStructure.causal(torch.ones(1, 4)).spans(torch.tensor([[1, 1, 0, 0]])).dense()[0, 0].int()
            tensor([[1, 1, 0, 0],
                    [1, 1, 0, 0],
                    [1, 1, 1, 0],
                    [1, 1, 1, 1]], dtype=torch.int32)
        """
        spans = self._of_self(spans, "spans")
        order, real = self.keys.order.expand(spans.shape), self._real().expand(spans.shape)
        columns = torch.arange(spans.shape[1], device=spans.device).expand(spans.shape)
        inside = real & (spans > 0)
        # A span begins where a real token differs from the real token before it.
        before = torch.where(real, columns, -1).cummax(-1).values.roll(1, -1)
        before[:, 0] = -1
        same = inside & (before >= 0) & (spans.gather(1, before.clamp_min(0)) == spans)
        start = inside & ~same
        run = torch.where(inside, start.int().cumsum(-1), 0)
        for row in range(len(spans)):
            numbers = spans[row][start[row]]
            if len(numbers.unique()) != len(numbers):
                raise ValueError(f"row {row} has a span in several pieces; the tokens of a span stand side by side")
        last = torch.zeros(spans.shape[0], int(run.max()) + 1, dtype=torch.int32, device=spans.device)
        last.scatter_reduce_(1, run, torch.where(inside, order, 0), "amax")
        return self._renewed(order=torch.where(inside, last.gather(1, run), order))

    def segments(self, segments: torch.Tensor, groups: torch.Tensor | None = None) -> AttentionStructure:
        """Put segments side by side: siblings begin at the same position and do not see each other.

        What follows a set of siblings sees all of them, from the position after the longest one.

        Args:
            segments: `(rows, tokens)` int, a number from 1 on for the tokens of each segment, which stand side by
                side; 0 for what all see.
            groups: `(rows, tokens)` int, a number from 1 on for each set of siblings. By default a set ends
                where a 0 stands between its segments and the next.

        Raises:
            ValueError: a segment or a set in several pieces, or groups that do not fit the segments.

        Example:
            >>> s = AttentionStructure.causal(torch.ones(1, 5)).segments(torch.tensor([[0, 1, 1, 2, 0]]))
            >>> s.queries.position
            tensor([[0, 1, 2, 1, 3]], dtype=torch.int32)
            >>> s.dense()[0, 0].int()
            tensor([[1, 0, 0, 0, 0],
                    [1, 1, 0, 0, 0],
                    [1, 1, 1, 0, 0],
                    [1, 0, 0, 1, 0],
                    [1, 1, 1, 1, 1]], dtype=torch.int32)
        """
        segments = self._of_self(segments, "segments")
        real = self._real().expand(segments.shape)
        segments = torch.where(real, segments, 0)
        groups = _runs(segments > 0, real) if groups is None else torch.where(real, self._of_self(groups, "groups"), 0)
        if bool(((groups > 0) != (segments > 0)).any()):
            raise ValueError("groups and segments must be above 0 at the same tokens")
        position = _side_by_side(real, segments, groups)
        return self._renewed(position=position, group=groups.int(), segment=segments.int())

    def documents(self, documents: torch.Tensor) -> AttentionStructure:
        """Pack several documents into a row: none sees another, and each begins at position 0.

        Args:
            documents: `(rows, tokens)` int, a number from 1 on for the tokens of each document, side by side.

        Raises:
            ValueError: a token of no document, or a document in several pieces.
        """
        documents = self._of_self(documents, "documents")
        real = self._real().expand(documents.shape)
        if bool((real & (documents < 1)).any()):
            raise ValueError("every token must belong to a document, numbered from 1 on")
        return self.segments(torch.where(real, documents, 0), real.int())

    def windowed(self, window: int | None) -> AttentionStructure:
        """Let queries see only keys that are less than `window` positions before them; None lifts it."""
        return dataclasses.replace(self, window=window)

    def extended(self, count: int) -> AttentionStructure:
        """Append tokens that follow plainly: they see all that is there, and each other causally.

        Args:
            count: tokens to append to every row.

        Raises:
            ValueError: a tree, or a negative number of tokens.
        """
        if count < 0:
            raise ValueError(f"a structure is extended by 0 tokens or more, got {count}")
        if self.nodes is not None:
            raise ValueError("a tree is not extended; make one with more nodes")
        rows, device = len(self.keys.order), self.keys.order.device
        steps = torch.arange(count, dtype=torch.int32, device=device).expand(rows, -1)
        last = torch.where(self._real(), self.keys.order, -1).amax(-1, keepdim=True)
        far = torch.where(self._real(), self.keys.position, -1).amax(-1, keepdim=True)
        more = {"order": last + 1 + steps, "position": far + 1 + steps}
        more |= dict.fromkeys(("group", "segment"), torch.zeros_like(steps)) if self.keys.group is not None else {}
        keys = Tokens(**{n: torch.cat([value, more[n].int()], dim=-1) for n, value in self.keys.named().items()})
        grown = {n: torch.cat([value, more[n].int()], dim=-1) for n, value in self.queries.named().items()}
        return dataclasses.replace(self, queries=Tokens(**grown), keys=keys)

    def part(self, start: int, stop: int) -> AttentionStructure:
        """Return the queries from `start` to before `stop`, and the keys up to there: a step with a cache.

        Args:
            start: number of tokens the cache holds.
            stop: number of tokens after the step.

        Raises:
            ValueError: a structure that has been read in parts already, or tokens it does not have.
        """
        if not 0 <= start <= stop <= len(self.keys):
            raise ValueError(f"a structure of {len(self.keys)} tokens has no part from {start} to {stop}")
        if self.nodes is not None or len(self.queries) != len(self.keys):
            raise ValueError("only a structure whose queries are its keys is read in parts")
        return dataclasses.replace(
            self, queries=self.queries.map(lambda f: f[:, start:stop]), keys=self.keys.map(lambda f: f[:, :stop])
        )

    def rows(self, index: torch.Tensor) -> AttentionStructure:
        """Return some rows (repeated, reordered); a structure that is the same for all rows stays as it is."""

        def take(field: torch.Tensor) -> torch.Tensor:
            return field if len(field) == 1 else field[index.to(field.device)]

        return self._mapped(take)

    def to(self, device: torch.device | str) -> AttentionStructure:
        """Return the structure on another device."""
        return self._mapped(lambda field: field.to(device))

    # What backends take

    @property
    def device(self) -> torch.device:
        """Where the fields are."""
        return self.keys.order.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows (1 where all agree), queries and keys."""
        fields = [*self.queries.named().values(), *self.keys.named().values()]
        fields += [field for field in (self.nodes, self.ancestors) if field is not None]
        return max(len(field) for field in fields), len(self.queries), len(self.keys)

    def dense(self) -> torch.Tensor:
        """Return `(rows, 1, queries, keys)` bool, True where a query sees a key; the reference of all backends."""
        q, k = self.queries, self.keys
        visible = k.order[:, None, :] <= q.order[:, :, None]
        if q.group is not None and k.group is not None and q.segment is not None and k.segment is not None:
            siblings = (q.group[:, :, None] == k.group[:, None, :]) & (k.group[:, None, :] > 0)
            visible = visible & ~(siblings & (q.segment[:, :, None] != k.segment[:, None, :]))
        if self.window is not None:
            visible = visible & (q.position[:, :, None] - k.position[:, None, :] < self.window)
        if self.nodes is not None and self.ancestors is not None:
            node = self.nodes.clamp_min(0).long()
            rows = max(len(self.nodes), len(self.ancestors))
            words = self.ancestors.expand(rows, -1, -1).gather(
                2, (node // 64)[:, None, :].expand(rows, self.ancestors.shape[1], -1)
            )
            above = (words >> (node % 64)[:, None, :]) & 1
            visible = visible & ((self.nodes < 0)[:, None, :] | above.bool())
        return visible[:, None]

    def mask_function(self) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return `visible(row, head, query, key)` on tensors of indices, as transformers and flex attention call it."""
        q, k = self.queries, self.keys
        nodes, ancestors, window = self.nodes, self.ancestors, self.window

        def at(field: torch.Tensor, row: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return field[0, index] if len(field) == 1 else field[row, index]

        def visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            found = at(k.order, row, key) <= at(q.order, row, query)
            if q.group is not None and k.group is not None and q.segment is not None and k.segment is not None:
                siblings = (at(k.group, row, key) > 0) & (at(q.group, row, query) == at(k.group, row, key))
                found = found & ~(siblings & (at(q.segment, row, query) != at(k.segment, row, key)))
            if window is not None:
                found = found & (at(q.position, row, query) - at(k.position, row, key) < window)
            if nodes is not None and ancestors is not None:
                node = at(nodes, row, key)
                number = node.clamp_min(0)
                words = (
                    ancestors[0, query, number // 64] if len(ancestors) == 1 else ancestors[row, query, number // 64]
                )
                found = found & ((node < 0) | (((words >> (number % 64)) & 1) != 0))
            return found

        return visible

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> AttentionStructure:
        return dataclasses.replace(
            self,
            queries=self.queries.map(change),
            keys=self.keys.map(change),
            nodes=None if self.nodes is None else change(self.nodes),
            ancestors=None if self.ancestors is None else change(self.ancestors),
        )

    def _real(self) -> torch.Tensor:
        return self.keys.order != NEVER

    def _of_self(self, field: torch.Tensor, name: str) -> torch.Tensor:
        if self.nodes is not None or len(self.queries) != len(self.keys):
            raise ValueError(f"{name} are given to a structure whose queries are its keys, before it is read in parts")
        if field.ndim != 2 or field.shape[1] != len(self.keys):
            raise ValueError(f"{name} must have the shape (rows, {len(self.keys)}), got {tuple(field.shape)}")
        rows = max(len(field), len(self.keys.order))
        if {len(field), len(self.keys.order)} - {1, rows}:
            raise ValueError(f"{name} of {len(field)} rows do not fit a structure of {len(self.keys.order)}")
        whole = field.to(self.device, torch.long)
        if bool(((whole < 0) | (whole != field.to(self.device))).any()):
            raise ValueError(f"{name} must be whole numbers from 0 on, got {field.tolist()}")
        return whole.expand(rows, -1)

    def _renewed(self, **fields: torch.Tensor) -> AttentionStructure:
        keys = dataclasses.replace(self.keys, **{name: value.int() for name, value in fields.items()})
        return dataclasses.replace(self, queries=_awake(keys), keys=keys)


def _awake(tokens: Tokens) -> Tokens:
    """Return tokens as queries: padding sees nothing, rather than everything."""
    return dataclasses.replace(tokens, order=torch.where(tokens.order == NEVER, -1, tokens.order))


def _bit(place: int) -> int:
    """Return the bit as a signed 64-bit number."""
    return 1 << place if place < 63 else -(1 << 63)


def _runs(inside: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Number the runs of `inside` from 1 on, 0 elsewhere; padding does not end a run."""
    outside = (real & ~inside).int().cumsum(-1)  # grows between runs
    number = torch.zeros_like(outside)
    for row in range(len(inside)):
        values = outside[row][inside[row]]
        if len(values):
            number[row][inside[row]] = torch.unique_consecutive(values, return_inverse=True)[1].to(number.dtype) + 1
    return number


def _side_by_side(real: torch.Tensor, segments: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return positions: siblings start together, what follows them starts after the longest."""
    position = torch.zeros(real.shape, dtype=torch.int32)
    for row, (here, own, sets) in enumerate(zip(real.tolist(), segments.tolist(), groups.tolist(), strict=True)):
        free = start = 0  # where the next token outside of the set goes, where the set's segments begin
        now: tuple[int, int] = (0, 0)
        count = 0
        seen: set[tuple[int, int]] = set()
        for column, (counts, segment, group) in enumerate(zip(here, own, sets, strict=True)):
            if not counts:
                continue
            if (group, segment) != now:
                if group and (group, segment) in seen:
                    raise ValueError(f"row {row} has segment {segment} in several pieces")
                if group != now[0]:
                    if group and any(known == group for known, _ in seen):
                        raise ValueError(f"row {row} has set {group} in several pieces")
                    start = free
                seen.add((group, segment))
                now, count = (group, segment), 0
            position[row, column] = start + count if group else free
            count += 1
            free = max(free, start + count) if group else free + 1
    return position.to(real.device)

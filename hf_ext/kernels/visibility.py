"""Who sees whom, inside of kernels. The reference is `AttentionStructure.dense`.

Pairs come as rows and columns of either orientation, queries by keys or keys by queries: whatever belongs to a
query has one shape, `(queries, 1)` or `(1, queries)`, whatever belongs to a key the other.
"""

# Triton gives kernels their types.
# mypy: allow-untyped-defs

from __future__ import annotations

from hf_ext.kernels.language import jit, tl


@jit
def query_fields(FIELDS, ANCESTORS, at, count, WINDOW: tl.constexpr, GROUPS: tl.constexpr, TREE: tl.constexpr):
    """Return order, position, group, segment and the first word of ancestors of the queries `at`.

    What is not looked at is not loaded. Behind `count` queries, the order is one that sees nothing.
    """
    inside = at < count
    order = tl.load(FIELDS + at, mask=inside, other=-2147483648)
    position = order
    group = order
    segment = order
    word = order.to(tl.int64)
    if WINDOW:
        position = tl.load(FIELDS + count + at, mask=inside, other=0)
    if GROUPS:
        group = tl.load(FIELDS + 2 * count + at, mask=inside, other=0)
        segment = tl.load(FIELDS + 3 * count + at, mask=inside, other=0)
    if TREE == 1:
        word = tl.load(ANCESTORS + at, mask=inside, other=0)
    return order, position, group, segment, word


@jit
def key_fields(FIELDS, at, count, WINDOW: tl.constexpr, GROUPS: tl.constexpr, TREE: tl.constexpr):
    """Return order, position, group, segment and node of the keys `at`; what is not looked at is not loaded."""
    inside = at < count
    order = tl.load(FIELDS + at, mask=inside, other=2147483647)
    position = order
    group = order
    segment = order
    node = order
    if WINDOW:
        position = tl.load(FIELDS + count + at, mask=inside, other=0)
    if GROUPS:
        group = tl.load(FIELDS + 2 * count + at, mask=inside, other=0)
        segment = tl.load(FIELDS + 3 * count + at, mask=inside, other=0)
    if TREE:
        node = tl.load(FIELDS + 4 * count + at, mask=inside, other=-1)
    return order, position, group, segment, node


@jit
def by_structure(
    query_at, key_at, of_query, of_key, query_count, key_count, window, ANCESTORS, words, WINDOW: tl.constexpr,
    GROUPS: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """Return which pairs see each other by the fields of a structure."""
    q_order, q_position, q_group, q_segment, word = of_query
    k_order, k_position, k_group, k_segment, k_node = of_key
    seen = (k_order <= q_order) & (query_at < query_count) & (key_at < key_count)
    if GROUPS:
        seen = seen & ((k_group <= 0) | (q_group != k_group) | (q_segment == k_segment))
    if WINDOW:
        seen = seen & (q_position - k_position < window)
    if TREE:
        node = tl.maximum(k_node, 0)
        if TREE == 1:
            above = word >> node.to(tl.int64)
        else:
            at = query_at.to(tl.int64) * words + (node >> 6)
            above = tl.load(ANCESTORS + at, mask=seen & (k_node >= 0), other=0) >> (node & 63).to(tl.int64)
        seen = seen & ((k_node < 0) | ((above & 1) != 0))
    return seen


@jit
def by_place(query_at, key_at, query_count, key_count, offset, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Return which pairs see each other where only places count, query `i` being key `i + offset`."""
    seen = (query_at < query_count) & (key_at < key_count)
    if CAUSAL:
        seen = seen & (key_at <= query_at + offset)
    if WINDOW:
        seen = seen & (query_at + offset - key_at < window)
    return seen


@jit
def hide(
    scores, query_at, key_at, of_query, of_key, query_count, key_count, offset, window, ANCESTORS, words, MASK,
    mask_stride, mask_unit, mask_least, STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    GROUPS: tl.constexpr, TREE: tl.constexpr, MASK_KIND: tl.constexpr,
):  # fmt: skip
    """Return scores with those of pairs that do not see each other at minus infinity.

    MASK_KIND is 0 without a dense mask, 1 for one of zeros and ones, 2 for one that is added (times `mask_unit`,
    which brings it to the unit of the scores), where `mask_least` and less hides.
    """
    if STRUCTURE:
        seen = by_structure(
            query_at, key_at, of_query, of_key, query_count, key_count, window, ANCESTORS, words, WINDOW, GROUPS, TREE
        )
    else:
        seen = by_place(query_at, key_at, query_count, key_count, offset, window, CAUSAL, WINDOW)
    if MASK_KIND:
        at = MASK + query_at.to(tl.int64) * mask_stride + key_at
        if MASK_KIND == 1:
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        else:
            bias = tl.load(at, mask=seen, other=float("-inf")).to(tl.float32)
            seen = seen & (bias > mask_least)
            scores = scores + bias * mask_unit
    return tl.where(seen, scores, float("-inf"))


@jit
def ranges_of_keys(
    first_query, last_query, key_count, offset, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return for some queries the blocks of keys they see: first, full from, full to, and the end.

    Only places count here. Behind `full from` and before `full to`, every query sees every key.
    """
    end = key_count
    full_end = key_count
    if CAUSAL:
        end = tl.minimum(end, last_query + offset + 1)
        full_end = tl.minimum(full_end, first_query + offset + 1)
    start = 0
    full_start = 0
    if WINDOW:
        start = tl.maximum(first_query + offset - window + 1, 0)
        full_start = tl.maximum(last_query + offset - window + 1, 0)
    start = start // BLOCK
    end = tl.maximum(tl.cdiv(tl.maximum(end, 0), BLOCK), start)
    full_start = tl.minimum(tl.cdiv(full_start, BLOCK), end)
    full_end = tl.minimum(tl.maximum(tl.maximum(full_end, 0) // BLOCK, full_start), end)
    if MASKED:
        full_start = start
        full_end = start
    return start, full_start, full_end, end


@jit
def ranges_of_queries(
    first_key, last_key, query_count, offset, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return for some keys the blocks of queries that see them: first, full from, full to, and the end.

    Queries that are not there see nothing anyway: a block is full if all queries in it that are there see all keys.
    """
    start = 0
    full_start = 0
    if CAUSAL:
        start = tl.maximum(first_key - offset, 0)
        full_start = tl.maximum(last_key - offset, 0)
    end = query_count
    full_end = tl.cdiv(query_count, BLOCK)
    if WINDOW:
        end = tl.minimum(end, tl.maximum(last_key - offset + window, 0))
        full_end = tl.minimum(full_end, tl.maximum(first_key - offset + window, 0) // BLOCK)
    start = start // BLOCK
    end = tl.maximum(tl.cdiv(end, BLOCK), start)
    full_start = tl.minimum(tl.cdiv(full_start, BLOCK), end)
    full_end = tl.minimum(tl.maximum(full_end, full_start), end)
    if MASKED:
        full_start = start
        full_end = start
    return start, full_start, full_end, end


@jit
def blocks_by_table(COUNTS, PARTS: tl.constexpr):
    """Return how many blocks are full and how many partial by a table whose blocks have `PARTS` parts, and zeros."""
    full = tl.load(COUNTS)
    looked_at = tl.load(COUNTS + 1)
    return full * PARTS, (looked_at - full) * PARTS, 0, 0, 0


@jit
def blocks_of_keys(
    COUNTS, first_query, last_query, key_count, offset, window, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return how many blocks of keys are full and how many partial, and what `block_start` finds them by."""
    if STRUCTURE:
        return blocks_by_table(COUNTS, SIZE // BLOCK)
    else:
        start, full_start, full_end, end = ranges_of_keys(
            first_query, last_query, key_count, offset, window, BLOCK, CAUSAL, WINDOW, MASKED
        )
        return full_end - full_start, full_start - start + end - full_end, start, full_start, full_end


@jit
def blocks_of_queries(
    COUNTS, first_key, last_key, query_count, offset, window, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    STRUCTURE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return how many blocks of queries are full and how many partial, and what `block_start` finds them by."""
    if STRUCTURE:
        return blocks_by_table(COUNTS, SIZE // BLOCK)
    else:
        start, full_start, full_end, end = ranges_of_queries(
            first_key, last_key, query_count, offset, window, BLOCK, CAUSAL, WINDOW, MASKED
        )
        return full_end - full_start, full_start - start + end - full_end, start, full_start, full_end


@jit
def block_start(
    step, INDICES, full_count, start, full_start, full_end, FULL: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, STRUCTURE: tl.constexpr,
):  # fmt: skip
    """Return where the full, or else partial, block number `step` begins."""
    if STRUCTURE:
        PARTS: tl.constexpr = SIZE // BLOCK
        if not FULL:
            step = step + full_count
        return tl.load(INDICES + step // PARTS) * SIZE + (step % PARTS) * BLOCK
    else:
        if FULL:
            return (full_start + step) * BLOCK
        else:
            before = full_start - start
            return tl.where(step < before, start + step, full_end + step - before) * BLOCK

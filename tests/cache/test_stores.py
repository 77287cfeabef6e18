"""Where entries lie: whatever happens to a store, it says what a list of columns would."""

from __future__ import annotations

import random

import pytest
import torch

from hf_ext.cache.entries import NOTHING
from hf_ext.cache.stores.dense import DenseStore
from hf_ext.cache.stores.ragged import RaggedStore

ROWS, HEADS = 3, 2


def held(store: DenseStore | RaggedStore, seen: int) -> list[list[list[int]]]:
    """Return the columns of each head; keys and fields say the same."""
    entries = store.entries(seen, torch.zeros(ROWS, dtype=torch.int64))
    real = entries.real
    assert torch.equal(entries.keys[..., 0][real].int(), entries.columns[real])
    assert torch.equal(entries.fields["twice"][real].int(), 2 * entries.columns[real])
    return [[[c for c in head if c != NOTHING] for head in row] for row in entries.columns.tolist()]


@pytest.mark.parametrize("kind", [DenseStore, RaggedStore])
@pytest.mark.parametrize("seed", range(3))
def test_columns_are_those_of_a_list_whatever_happens(kind, seed: int) -> None:
    """Padding in any turn, long gaps, heads of their own, rows moved, tokens forgotten, saved and read again."""
    draw = random.Random(seed)
    store, seen = kind(("twice",)), 0
    wanted: list[list[list[int]]] = [[[] for _ in range(HEADS)] for _ in range(ROWS)]

    def append(count: int, padded: bool) -> None:
        nonlocal seen
        real = torch.ones(ROWS, count, dtype=torch.bool)
        if padded:
            for row in range(ROWS):
                real[row, : draw.choice([0, count // 2, count])] = False
        columns = torch.arange(seen, seen + count).float()
        keys = columns.view(1, 1, -1, 1).expand(ROWS, HEADS, -1, 2).contiguous()
        store.append(keys, keys, seen, real if padded else None)
        now = store.entries(seen + count, torch.zeros(ROWS, dtype=torch.int64))
        store.note({"twice": 2.0 * now.columns})
        for row in range(ROWS):
            for head in range(HEADS):
                wanted[row][head] += [seen + i for i in range(count) if real[row, i]]
        seen += count

    for step in range(14):
        append(draw.choice([1, 1, 5, 300]), padded=step in (0, 6))
        action = draw.choice(["keep", "keep", "rows", "repeat", "save", "none", "forget"])
        if action == "keep":
            entries = store.entries(seen, torch.zeros(ROWS, dtype=torch.int64))
            most = min(8, len(store))
            index = torch.full((ROWS, HEADS, most), NOTHING)
            for row in range(ROWS):
                least = min(len(head) for head in wanted[row])
                for head in range(HEADS):
                    have = len(wanted[row][head])
                    count = min(most, least) if kind is DenseStore else min(draw.randint(1, most), have)
                    chosen = sorted(draw.sample(range(have), count))
                    wanted[row][head] = [wanted[row][head][i] for i in chosen]
                    place = (entries.columns[row, head] >= 0).nonzero()[:, 0]
                    index[row, head, most - count :] = place[torch.tensor(chosen, dtype=torch.int64)]
            store.keep(index, entries)
        elif action in ("rows", "repeat"):
            order = [draw.randrange(ROWS) for _ in range(ROWS)]
            if action == "repeat":
                store.repeat(2)
                store.select(torch.tensor([2 * row for row in order]))
            else:
                store.select(torch.tensor(order))
            wanted = [[list(head) for head in wanted[row]] for row in order]
        elif action == "save":
            state, store = store.state(), kind(("twice",))
            store.restore(state)
        elif action == "forget" and all(head[-1:] == [seen - 1] for row in wanted for head in row):
            store.drop_last(1)
            wanted = [[head[:-1] for head in row] for row in wanted]
            seen -= 1
        assert held(store, seen) == wanted, (step, action)
        if kind is DenseStore and (any(store.holes) or len(store) < 2):
            continue  # padding of a later turn stays where it is until something is dropped
        last = store.last_columns(2)
        assert last.tolist() == [[([NOTHING, NOTHING, *head])[-2:] for head in row] for row in wanted], (step, action)


@pytest.mark.parametrize("kind", [DenseStore, RaggedStore])
def test_a_column_takes_a_byte_for_all_heads_and_one_for_each_where_they_differ(kind) -> None:
    store = kind()
    keys = torch.randn(1, HEADS, 200, 4)
    store.append(keys, keys, 0, None)
    assert store.buffers["steps"].nbytes == 200 * (1 if kind is DenseStore else HEADS) + (kind is RaggedStore) * 2 * 3
    index = torch.stack([torch.arange(0, 200, 4), torch.arange(0, 100, 2)])[None]
    store.keep(index, store.entries(200, torch.zeros(1, dtype=torch.int64)))
    assert store.buffers["steps"].nbytes == HEADS * 50
    assert store.entries(200, torch.zeros(1)).columns[0, 0].tolist() == list(range(0, 200, 4))

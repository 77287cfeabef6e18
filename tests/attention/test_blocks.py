"""Kernel arguments say what the structure says, whatever it is composed of and however it is cut into blocks."""

from __future__ import annotations

import random

import pytest
import torch

from hf_ext.attention import AttentionStructure, Tokens
from hf_ext.attention.blocks import EMPTY, FULL, PARTIAL, BlockTable, classes, is_plain_causal, kernel_arguments


def cuts(length: int, pick: random.Random, numbers: bool = True) -> torch.Tensor:
    """Runs that stand side by side: 0 0 1 1 1 0 2 3 3."""
    row: list[int] = []
    run = 0
    while len(row) < length:
        run += 1
        row += [run if not numbers or pick.random() < 0.7 else 0] * pick.randint(1, 9)
    return torch.tensor(row[:length])


def structure(seed: int) -> AttentionStructure:
    pick = random.Random(seed)
    length, rows = pick.randint(1, 70), pick.randint(1, 3)
    mask = torch.ones(rows, length, dtype=torch.int64)
    side = pick.choice(["none", "left", "right"])
    for row in mask:
        pads = pick.randint(0, length - 1)
        if side == "left":
            row[:pads] = 0
        elif side == "right":
            row[length - pads :] = 0
    kind = pick.choice(["causal", "bidirectional", "spans", "segments", "documents", "tree"])
    if kind == "tree":
        nodes = pick.choice([1, 5, 64, 90])
        parents = [[pick.randint(-1, node - 1) for node in range(nodes)] for _ in range(rows)]
        found = AttentionStructure.tree(mask, parents)
        return found.windowed(pick.choice([None, 4, 30]))
    found = AttentionStructure.causal(mask)
    fields = torch.stack([cuts(length, pick, numbers=kind != "documents") for _ in range(rows)])
    if kind == "bidirectional":
        found = AttentionStructure.bidirectional(mask)
    elif kind == "spans":
        found = found.spans(fields)
    elif kind == "segments":
        found = found.segments(fields)
    elif kind == "documents":
        found = found.documents(fields)
    if pick.random() < 0.5:
        found = found.windowed(pick.choice([1, 5, 20]))
    if pick.random() < 0.4:
        found = found.extended(pick.randint(1, 12))
    if pick.random() < 0.4:
        stop = pick.randint(1, len(found.keys))
        found = found.part(pick.randint(0, stop - 1), stop)
    return found


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_random_compositions_are_seen_through_blocks_as_they_are(size: int) -> None:
    looked_at = [0, 0, 0]
    for seed in range(120):
        expected = structure(seed)
        arguments = kernel_arguments(expected, size)
        found, wanted = arguments.dense(), expected.dense()
        assert found.shape == wanted.shape, f"seed {seed}"
        assert torch.equal(found, wanted), f"seed {seed}: {int((found != wanted).sum())} pairs differ"
        transposed = arguments.by_key.classes().transpose(1, 2)
        assert torch.equal(arguments.by_query.classes(), transposed), f"seed {seed}: the tables disagree"
        for kind in (EMPTY, PARTIAL, FULL):
            looked_at[kind] += int((transposed == kind).sum())
    assert looked_at[EMPTY] > 0, looked_at
    assert looked_at[FULL] > 0 or size == 64, looked_at


@pytest.mark.parametrize("seed", range(40))
def test_blocks_of_one_pair_leave_nothing_to_look_at_but_trees_and_the_edge(seed: int) -> None:
    expected = structure(seed)
    if expected.nodes is None:
        found = classes(expected, 1)
        assert torch.equal(found == FULL, expected.dense()[:, 0]), "a block of one pair is full where it is seen"
        assert torch.equal(found == EMPTY, ~expected.dense()[:, 0]), "and empty where it is not"


def test_half_of_a_causal_square_is_skipped_and_only_the_diagonal_is_partial() -> None:
    found = classes(AttentionStructure.causal(torch.ones(1, 64)), 16)[0]
    assert found.tolist() == [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]]


def test_documents_and_padding_skip_blocks() -> None:
    documents = torch.arange(4).repeat_interleave(16)[None] + 1
    found = classes(AttentionStructure.causal(torch.ones(1, 64)).documents(documents), 16)[0]
    assert torch.equal(found, torch.eye(4, dtype=torch.int8))
    mask = torch.ones(1, 64)
    mask[:, :32] = 0
    found = classes(AttentionStructure.causal(mask), 16)[0]
    assert found.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 2, 1]]


def test_a_document_in_two_blocks_beside_padding_is_still_skipped_by_its_neighbour() -> None:
    mask = torch.ones(1, 48)
    mask[:, :5] = 0
    documents = torch.tensor([[0] * 5 + [1] * 11 + [2] * 32])
    found = classes(AttentionStructure.causal(mask).documents(documents), 16)[0]
    assert found.tolist() == [[1, 0, 0], [0, 1, 0], [0, 2, 1]]


def test_the_last_block_of_keys_is_looked_at_where_keys_end_in_it() -> None:
    found = classes(AttentionStructure.bidirectional(torch.ones(1, 20)), 16)[0]
    assert found.tolist() == [[2, 1], [2, 1]]


def test_queries_of_the_end_are_those_of_the_whole() -> None:
    for seed in range(30):
        expected = structure(seed)
        count = min(3, len(expected.queries))
        found = kernel_arguments(expected, 8).last(count)
        assert torch.equal(found.dense(), expected.dense()[:, :, -count:]), f"seed {seed}"


def test_arguments_name_what_is_looked_at() -> None:
    plain = AttentionStructure.causal(torch.ones(2, 5))
    assert (kernel_arguments(plain).groups, kernel_arguments(plain).window, kernel_arguments(plain).tree) == (
        False,
        0,
        0,
    )
    assert kernel_arguments(plain.windowed(3)).window == 3
    assert kernel_arguments(plain.segments(torch.tensor([[1, 1, 2, 0, 0]]))).groups
    assert kernel_arguments(AttentionStructure.tree(torch.ones(1, 2), [[-1] * 64])).tree == 1
    assert kernel_arguments(AttentionStructure.tree(torch.ones(1, 2), [[-1] * 65])).tree == 2
    assert all(tensor.is_contiguous() for tensor in kernel_arguments(plain, 2).tensors())


def test_plain_causal_structures_are_known_by_their_values() -> None:
    plain = AttentionStructure.causal(torch.ones(2, 6))
    assert is_plain_causal(plain)
    assert is_plain_causal(plain.part(2, 5).windowed(3))
    assert is_plain_causal(plain.extended(3))
    for other in (
        AttentionStructure.bidirectional(torch.ones(1, 6)),
        AttentionStructure.causal(torch.tensor([[0, 1, 1]])),
        AttentionStructure.causal(torch.tensor([[1, 1, 0]])),
        plain.segments(torch.tensor([[1, 1, 2, 2, 0, 0]])),
        AttentionStructure.tree(torch.ones(1, 2), [[-1, 0]]),
        AttentionStructure(Tokens(plain.keys.order, plain.keys.position * 2), plain.keys, window=2),
    ):
        assert not is_plain_causal(other)


def test_a_table_gives_back_its_classes() -> None:
    made = torch.randint(0, 3, (2, 5, 7), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(BlockTable.of(made).classes(), made)


def test_sizes_that_are_no_power_of_two_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two, got 48"):
        kernel_arguments(AttentionStructure.causal(torch.ones(1, 4)), 48)

"""Dense masks, mask functions, block masks, packed tensors and kernel arguments all say the same.

What they are held against is written twice: by the rules at the head of `structure.py`, field by field, and
by what the compositions mean, without any field.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from hf_ext.attention import NEVER, AttentionStructure, mask_for, masks_for, pack, register_conversion, unpack
from hf_ext.attention import masks as masks_module
from hf_ext.attention.blocks import kernel_arguments
from hf_ext.testing import tiny_models

CPU = torch.device("cpu")


def runs(length: int, pick: random.Random) -> list[int]:
    """Numbers of runs that stand side by side, 0 between some of them: `0 1 1 1 2 2 0 3`."""
    row: list[int] = []
    number = 0
    while len(row) < length:
        if pick.random() < 0.3:
            row += [0] * pick.randint(1, 3)
        number += 1
        row += [number] * pick.randint(1, 5)
    return row[:length]


def story(seed: int) -> dict[str, Any]:
    """What a random structure is made of."""
    pick = random.Random(seed)
    length, rows = pick.randint(1, 24), pick.randint(1, 3)
    real = []
    for _ in range(rows):
        left, right = pick.choice([(0, 0), (pick.randint(0, length - 1), 0), (0, pick.randint(0, length - 1))])
        real.append([left <= place < length - right for place in range(length)])
    kind = pick.choice(["causal", "bidirectional", "spans", "segments", "documents", "spans in segments"])
    made: dict[str, Any] = {"real": real, "kind": kind, "runs": [runs(length, pick) for _ in range(rows)]}
    if kind == "documents":
        made["runs"] = [[sum(number != row[i - 1] for i, number in enumerate(row[: at + 1]) if i) + 1
                         for at in range(length)] for row in made["runs"]]  # fmt: skip
    made["window"] = pick.choice([None, None, 1, 3, 9])
    made["extended"] = pick.choice([0, 0, 1, 4])
    total = length + made["extended"]
    stop = pick.randint(1, total)
    made["part"] = pick.choice([None, (pick.randint(0, stop - 1), stop)])
    return made


def structure_of(made: dict[str, Any]) -> AttentionStructure:
    mask = torch.tensor(made["real"])
    numbers = torch.tensor(made["runs"])
    found = AttentionStructure.causal(mask)
    if made["kind"] == "bidirectional":
        found = AttentionStructure.bidirectional(mask)
    if made["kind"] == "spans":
        found = found.spans(numbers)
    if made["kind"] in ("segments", "spans in segments"):
        found = found.segments(numbers)
    if made["kind"] == "spans in segments":
        found = found.spans(numbers)
    if made["kind"] == "documents":
        found = found.documents(numbers)
    found = found.windowed(made["window"])
    if made["extended"]:
        found = found.extended(made["extended"])
    return found.part(*made["part"]) if made["part"] else found


def by_meaning(made: dict[str, Any]) -> torch.Tensor:
    """Who sees whom by what the words mean, token by token."""
    kind, extended = made["kind"], made["extended"]
    matrices = []
    for here, numbers in zip(made["real"], made["runs"], strict=True):
        here, numbers = here + [True] * extended, numbers + [0] * extended
        length = len(here)
        grouped = kind in ("segments", "spans in segments", "documents")
        group, count = [0] * length, 0
        last_outside = True
        for i in range(length):
            if not here[i]:
                continue
            if grouped and numbers[i] > 0:
                count += last_outside and kind != "documents"
                group[i], last_outside = (1 if kind == "documents" else count), False
            else:
                last_outside = True
        position = positions(here, numbers if grouped else [0] * length, group)
        spans = {
            "spans": numbers,
            "spans in segments": numbers,
            "bidirectional": [1] * (length - extended) + [0] * extended,
        }
        span = spans.get(kind, [0] * length)
        matrix = torch.zeros(length, length, dtype=torch.bool)
        for q in range(length):
            for k in range(length):
                seen = here[q] and here[k] and (k <= q or (span[q] > 0 and span[q] == span[k]))
                seen = seen and not (group[q] > 0 and group[q] == group[k] and numbers[q] != numbers[k])
                near = made["window"] is None or position[q] - position[k] < made["window"]
                matrix[q, k] = seen and near
        start, stop = made["part"] or (0, length)
        matrices.append(matrix[start:stop, :stop])
    return torch.stack(matrices)[:, None]


def positions(here: list[bool], numbers: list[int], group: list[int]) -> list[int]:
    """Siblings begin where their set begins; what follows a set begins after the longest of them."""
    found, free = [0] * len(here), 0
    at = 0
    while at < len(here):
        if not here[at] or group[at] == 0:
            found[at] = free if here[at] else 0
            free += here[at]
            at += 1
            continue
        start, own = free, group[at]
        lengths: dict[int, int] = {}
        while at < len(here) and (not here[at] or group[at] == own):
            if here[at]:
                count = lengths.get(numbers[at], 0)
                found[at], lengths[numbers[at]] = start + count, count + 1
            at += 1
        free = start + max(lengths.values())
    return found


def by_the_rules(structure: AttentionStructure) -> torch.Tensor:
    """Who sees whom by the rules at the head of the module, one pair at a time."""
    rows, queries, keys = structure.shape
    sides = [{n: f.expand(rows, -1).tolist() for n, f in side.named().items()}
             for side in (structure.queries, structure.keys)]  # fmt: skip
    q, k = sides
    found = torch.zeros(rows, 1, queries, keys, dtype=torch.bool)
    nodes = None if structure.nodes is None else structure.nodes.expand(rows, -1).tolist()
    bits = None if structure.ancestors is None else structure.ancestors.expand(rows, -1, -1).tolist()
    for r in range(rows):
        for i in range(queries):
            for j in range(keys):
                seen = k["order"][r][j] <= q["order"][r][i]
                if "group" in k and q["group"][r][i] == k["group"][r][j] > 0:
                    seen = seen and q["segment"][r][i] == k["segment"][r][j]
                if structure.window is not None:
                    seen = seen and q["position"][r][i] - k["position"][r][j] < structure.window
                if nodes is not None and bits is not None and (node := nodes[r][j]) >= 0:
                    seen = seen and bool((bits[r][i][node // 64] >> (node % 64)) & 1)
                found[r, 0, i, j] = seen
    return found


def random_tree(seed: int) -> AttentionStructure:
    pick = random.Random(seed)
    rows, nodes, columns = pick.randint(1, 3), pick.choice([1, 4, 9, 64, 67]), pick.randint(0, 6)
    parents = [[pick.randint(-1, node - 1) for node in range(nodes)] for _ in range(rows)]
    context = torch.tensor([[pick.random() < 0.8 for _ in range(columns)] for _ in range(rows)]).reshape(rows, columns)
    found = AttentionStructure.tree(context, parents).windowed(pick.choice([None, 3]))
    if pick.random() < 0.5:
        keep = pick.randint(0, nodes - 1)
        found = dataclasses.replace(
            found, queries=found.queries.map(lambda f: f[:, keep:]), ancestors=found.ancestors[:, keep:]
        )
    return found


def read_off(function: Any, shape: tuple[int, int, int]) -> torch.Tensor:
    """Ask a mask function about every pair at once."""
    rows, queries, keys = (torch.arange(n) for n in shape)
    q, k = queries[None, :, None], keys[None, None, :]
    return function(rows[:, None, None], torch.zeros((), dtype=torch.long), q, k)[:, None].expand(
        shape[0], 1, *shape[1:]
    )


def differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    assert found.shape[1:] == expected.shape[1:], (found.shape, expected.shape)
    return int((found != expected).sum())


@pytest.mark.parametrize("seed", range(150))
def test_a_composed_structure_means_what_it_says_in_every_form(seed: int) -> None:
    made = story(seed)
    structure = structure_of(made)
    expected = by_meaning(made)
    forms = {
        "dense": structure.dense(),
        "mask function": read_off(structure.mask_function(), structure.shape),
        "packed": unpack(pack(structure).clone(), structure.shape[1], structure.shape[2]).dense(),
        "kernel arguments": kernel_arguments(structure, 8).dense(),
        "kernel arguments of packed": kernel_arguments(unpack(pack(structure).clone(), structure.shape[1]), 8).dense(),
        "rules": by_the_rules(structure),
    }
    wrong = {name: differing(found, expected) for name, found in forms.items()}
    assert not any(wrong.values()), f"pairs that differ: {wrong}, of {made}"


@pytest.mark.parametrize("seed", range(40))
def test_a_tree_is_the_same_in_every_form(seed: int) -> None:
    structure = random_tree(seed)
    expected = by_the_rules(structure)
    forms = {
        "dense": structure.dense(),
        "mask function": read_off(structure.mask_function(), structure.shape),
        "packed": unpack(pack(structure).clone(), *structure.shape[1:]).dense(),
        "kernel arguments": kernel_arguments(unpack(pack(structure).clone(), structure.shape[1]), 16).dense(),
    }
    wrong = {name: differing(found, expected) for name, found in forms.items()}
    assert not any(wrong.values()), f"pairs that differ: {wrong}"


@pytest.mark.parametrize("seed", [0, 3, 7, 11, 19, 26])
def test_a_block_mask_leaves_out_no_block_in_which_something_is_seen(seed: int) -> None:
    structure = structure_of(story(seed)) if seed % 2 else random_tree(seed)
    block = mask_for("flex_attention", structure, torch.float32, CPU)
    expected = structure.dense()
    assert differing(read_off(block.mask_mod, structure.shape), expected) == 0
    size_q, size_k = block.BLOCK_SIZE
    looked_at = block.to_dense().repeat_interleave(size_q, 2).repeat_interleave(size_k, 3).bool()
    assert not (expected & ~looked_at[:, :, : expected.shape[2], : expected.shape[3]]).any()


def test_flex_attention_computes_with_a_structure_what_eager_does() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    structure = AttentionStructure.causal(torch.ones(2, 9)).segments(torch.tensor([[0, 1, 1, 2, 2, 2, 0, 0, 0]] * 2))
    query, key, value = (torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    block = mask_for("flex_attention", structure, torch.float32, CPU)
    found = flex_attention(query, key, value, block_mask=block)
    scores = query @ key.transpose(2, 3) / 4 + mask_for("eager", structure, torch.float32, CPU)
    assert (found - scores.softmax(-1) @ value).abs().max() < 1e-5


def test_masks_have_the_form_of_the_implementation() -> None:
    structure = AttentionStructure.causal(torch.tensor([[0, 1, 1]]))
    boolean = mask_for("sdpa", structure, torch.float32, CPU)
    assert boolean.dtype == torch.bool
    additive = mask_for("eager", structure, torch.bfloat16, CPU)
    assert additive.dtype == torch.bfloat16
    assert torch.equal(additive == 0, boolean)
    assert torch.equal(mask_for("hf_ext", structure, torch.float32, CPU), boolean)
    with pytest.raises(ValueError, match=r"flash_attention_2.*takes no mask"):
        mask_for("flash_attention_2", structure, torch.float32, CPU)


def test_a_conversion_that_is_registered_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_module, "_CONVERSIONS", dict(masks_module._CONVERSIONS))
    structure = AttentionStructure.causal(torch.ones(1, 2))
    register_conversion("mine", lambda structure, dtype, device: ("mine", structure))
    assert mask_for("mine", structure, torch.float32, CPU) == ("mine", structure)


def test_windows_of_a_model_count_positions_and_not_columns() -> None:
    """Options of a set may be swapped: what a query behind them sees of each stays the same."""
    model = tiny_models.shared("mistral")
    long, short = [1] * 6, [2] * 3
    rows = [[0, *long, *short, 0, 0], [0, *short, *long, 0, 0]]
    found = [masks_for(model, AttentionStructure.causal(torch.ones(1, 12)).segments(torch.tensor([r]))) for r in rows]
    moved = torch.tensor([0, 7, 8, 9, 1, 2, 3, 4, 5, 6, 10, 11])
    assert torch.equal(found[0][0, 0][moved][:, moved], found[1][0, 0])
    assert int(found[0].sum()) < int(AttentionStructure.causal(torch.ones(1, 12)).segments(
        torch.tensor([rows[0]])).dense().sum()), "the window hides nothing"  # fmt: skip


def test_the_smaller_of_two_windows_holds() -> None:
    model = tiny_models.shared("gemma3")
    structure = AttentionStructure.causal(torch.ones(1, 20))
    for own in (3, 12, None):
        found = masks_for(model, structure.windowed(own))
        smaller = min(tiny_models.WINDOW, own or 99)
        assert torch.equal(found["sliding_attention"], structure.windowed(smaller).dense())
        assert torch.equal(found["full_attention"], structure.windowed(own).dense())


def test_layers_to_which_a_structure_says_nothing_are_refused() -> None:
    model = tiny_models.build("llama")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    model.config.attention_chunk_size = 4
    with pytest.raises(ValueError, match="chunked_attention"):
        masks_for(model, AttentionStructure.causal(torch.ones(1, 3)))


def test_what_is_no_structure_is_refused() -> None:
    plain = AttentionStructure.causal(torch.ones(2, 4))
    wrong = {
        r"segments must be whole numbers from 0 on": lambda: plain.segments(torch.tensor([[-1, 1, 1, 0]])),
        r"spans must be whole numbers from 0 on": lambda: plain.spans(torch.tensor([[0.5, 1, 1, 0]])),
        r"segments of 3 rows do not fit a structure of 2": lambda: plain.segments(torch.ones(3, 4)),
        r"4 tokens has no part from 3 to 9": lambda: plain.part(3, 9),
        r"4 tokens has no part from -1 to 2": lambda: plain.part(-1, 2),
        r"0 tokens or more, got -1": lambda: plain.extended(-1),
        r"an int of at least 1, got 1\.5": lambda: plain.windowed(1.5),  # type: ignore[arg-type]
    }
    for message, made in wrong.items():
        with pytest.raises(ValueError, match=message):
            made()


def test_a_packed_structure_that_does_not_fit_is_refused() -> None:
    packed = pack(AttentionStructure.causal(torch.ones(1, 5)))
    with pytest.raises(ValueError, match="10 queries and keys together"):
        unpack(packed, 5, 7)
    with pytest.raises(ValueError, match="dense mask is bool"):
        unpack(torch.ones(1, 1, 5, 5, dtype=torch.bool), 5)
    with pytest.raises(ValueError, match="6 fields"):
        unpack(torch.zeros(1, 1, 6, 10, dtype=torch.int32), 5)
    assert int(AttentionStructure.causal(torch.tensor([[0, 1]])).keys.order[0, 0]) == NEVER

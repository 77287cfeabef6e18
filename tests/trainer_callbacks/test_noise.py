"""Random numbers of objectives: uniform, independent, and the same however the batch is cut."""

import pytest
import torch

from hf_ext.trainer_callbacks.noise import document_positions, uniform

DOCUMENTS = [torch.randint(4, 60, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 5, 7)]


def draw(document, per_document=True, step=0):
    return uniform({"input_ids": document[None]}, seed=1, step=step, per_document=per_document)[0]


def padded(side):
    longest = max(map(len, DOCUMENTS))
    rows, masks = [], []
    for document in DOCUMENTS:
        gap = [torch.zeros(longest - len(document), dtype=torch.long)]
        one = [torch.ones_like(document)]
        rows.append(torch.cat([*gap, document] if side == "left" else [document, *gap]))
        masks.append(torch.cat(gap + one if side == "left" else one + gap))
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


@pytest.mark.parametrize("per_document", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_does_not_change_a_documents_numbers(side, per_document):
    batch = padded(side)
    drawn = uniform(batch, seed=1, step=0, per_document=per_document)
    for row, mask, document in zip(drawn, batch["attention_mask"].bool(), DOCUMENTS, strict=True):
        assert torch.equal(row[mask], draw(document, per_document))


@pytest.mark.parametrize("per_document", [False, True])
def test_packing_documents_into_one_row_does_not_change_their_numbers(per_document):
    packed = {
        "input_ids": torch.cat(DOCUMENTS)[None],
        "position_ids": torch.cat([torch.arange(len(document)) for document in DOCUMENTS])[None],
    }
    drawn = uniform(packed, seed=1, step=0, per_document=per_document)[0]
    assert torch.equal(drawn, torch.cat([draw(document, per_document) for document in DOCUMENTS]))


def test_shared_numbers_are_equal_in_all_documents_and_others_are_not():
    shared = [draw(document, per_document=False)[:5] for document in DOCUMENTS]
    own = [draw(document)[:5] for document in DOCUMENTS]
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], shared[2])
    assert not torch.isclose(own[0], own[1]).any()


def test_numbers_are_uniform_and_uncorrelated_over_positions_steps_seeds_and_streams():
    tokens = {"input_ids": torch.randint(0, 60, (64, 512), generator=torch.Generator().manual_seed(0))}
    first = uniform(tokens, seed=0, step=0, per_document=True)
    assert float(first.min()) >= 0
    assert float(first.max()) < 1
    counts = torch.histc(first.float(), bins=16, min=0, max=1)
    expected = first.numel() / 16
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 40, f"chi-square over 16 bins is {chi_square:.1f}"  # 15 degrees: 40 has p < 0.001
    others = {
        "position": first.roll(1, dims=-1),
        "step": uniform(tokens, seed=0, step=1, per_document=True),
        "seed": uniform(tokens, seed=1, step=0, per_document=True),
        "stream": uniform(tokens, seed=0, step=0, stream=1, per_document=True),
        "row": first.roll(1, dims=0),
    }
    for name, other in others.items():
        pair = torch.corrcoef(torch.stack((first.flatten(), other.flatten())))
        assert abs(float(pair[0, 1])) < 0.02, f"correlation over {name}: {float(pair[0, 1]):.3f}"


def test_numbers_stay_the_same_from_release_to_release():
    drawn = uniform({"input_ids": torch.tensor([[5, 6, 7]])}, seed=3, step=2)[0]
    again = [_splitmix(_splitmix(_splitmix(_splitmix(3) + 2) + 0) + position) for position in range(3)]
    assert drawn.tolist() == [(value & (1 << 53) - 1) / (1 << 53) for value in again]


def _splitmix(value):
    bits = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & bits
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & bits
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & bits
    return value ^ value >> 31


def test_positions_follow_position_ids_then_the_mask_then_the_columns():
    tokens = torch.ones(1, 4, dtype=torch.long)
    given = torch.tensor([[0, 1, 0, 1]])
    mask = torch.tensor([[0, 1, 1, 1]])
    both = {"input_ids": tokens, "position_ids": given, "attention_mask": mask}
    assert document_positions(both).tolist() == given.tolist()
    assert document_positions({"input_ids": tokens, "attention_mask": mask}).tolist() == [[-1, 0, 1, 2]]
    assert document_positions({"input_ids": tokens}).tolist() == [[0, 1, 2, 3]]

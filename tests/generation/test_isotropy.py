"""Isotropy has the values that its definition gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_ext.generation.isotropy import isotropy
from hf_ext.testing import tiny_models


def states_of(*vectors: list[float]) -> Any:
    """A model that has these hidden states whatever it reads."""

    class Fixed(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            rows = torch.tensor([vectors]).expand(len(input_ids), -1, -1)
            return SimpleNamespace(hidden_states=(torch.full_like(rows, torch.nan), rows))

    return Fixed()


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([[1.0, 2.0], [2.0, 4.0], [0.1, 0.2]], 0.0),  # all point the same way
        ([[3.0, 0.0, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, 1.0]], 1.0),  # all at right angles
        ([[1.0, 0.0], [-2.0, 0.0]], 2.0),  # opposite
        ([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 2 / 3),  # one pair of three is the same
    ],
)
def test_closed_forms(vectors: list[list[float]], expected: float) -> None:
    ids = torch.ones(2, len(vectors), dtype=torch.long)
    assert isotropy(states_of(*vectors), ids).tolist() == pytest.approx([expected, expected], abs=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "opt"])
def test_padding_on_either_side_does_not_count(kind: str) -> None:
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts((11, 6))
    alone = torch.cat([isotropy(model, row[on.bool()][None]) for row, on in zip(ids, mask, strict=True)])
    for side, batch in (("left", (ids, mask)), ("right", (row_shift(ids, mask), row_shift(mask, mask)))):
        padded = isotropy(model, *batch)
        assert (padded - alone).abs().max() < 1e-5, f"{kind}, padded on the {side}: {padded}, alone {alone}"


def row_shift(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Move what the mask marks in each row to the left end."""
    return torch.stack([row.roll(-int((on == 0).sum())) for row, on in zip(values, mask, strict=True)])


@torch.no_grad()
def test_it_is_one_minus_the_mean_over_all_pairs() -> None:
    model, (ids, mask) = tiny_models.shared("gpt2"), tiny_models.prompts((8, 8))
    states = model(ids, output_hidden_states=True).hidden_states[-1]
    for row, value in zip(states, isotropy(model, ids, mask), strict=True):
        pairs = [(a, b) for a in range(8) for b in range(8) if a != b]
        mean = sum(float(torch.cosine_similarity(row[a], row[b], dim=0)) for a, b in pairs) / len(pairs)
        assert abs(float(value) - (1 - mean)) < 1e-5, f"{float(value)}, by the pairs {1 - mean}"


def test_a_row_of_one_token_has_no_isotropy() -> None:
    ids, mask = tiny_models.prompts((3, 1))
    with pytest.raises(ValueError, match="at least two"):
        isotropy(tiny_models.shared("gpt2"), ids, mask)

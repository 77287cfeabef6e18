"""Inputs, and memory that says when it was not written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_ext.attention import AttentionStructure
from hf_ext.attention.blocks import kernel_arguments
from hf_ext.kernels.language import INTERPRETED

Inputs = Callable[..., list[torch.Tensor]]


def pytest_sessionstart() -> None:
    assert INTERPRETED, "TRITON_INTERPRET=1 must be set before Triton is imported; test_interpreted.py does it"


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill memory that nobody has written with NaN."""

    def poisoned(make: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return filled

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    assert torch.zeros(1).new_empty(3).isnan().all()


@pytest.fixture
def inputs() -> Inputs:
    """Return a function that makes query, key and value; every second one lies in memory tokens first."""

    def made(
        batch: int = 1, heads: int = 2, key_heads: int = 1, queries: int = 33, keys: int = 33, width: int = 32,
        value_width: int | None = None, dtype: torch.dtype = torch.float32,
    ) -> list[torch.Tensor]:  # fmt: skip
        generator = torch.Generator().manual_seed(queries * 1000 + keys + width)

        def tokens_first(heads: int, tokens: int, width: int) -> torch.Tensor:
            return torch.randn(batch, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2)

        query = tokens_first(heads, queries, width)
        value = tokens_first(key_heads, keys, value_width or width)
        return [query, tokens_first(key_heads, keys, width).contiguous(), value]

    return made


def _padded(rows: int, tokens: int) -> torch.Tensor:
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        mask[row, : 13 * row] = 0
    return mask


def _segments(tokens: int) -> torch.Tensor:
    row = torch.zeros(tokens, dtype=torch.int64)
    for number, start in enumerate(range(5, tokens - 10, 11)):
        row[start : start + 11] = number + 1
    return row[None]


def structures(rows: int = 2, tokens: int = 41) -> dict[str, AttentionStructure]:
    """Return structures by name."""
    plain = AttentionStructure.causal(_padded(rows, tokens))
    one = AttentionStructure.causal(torch.ones(1, tokens))
    nodes = 9
    parents = [[(node - 1) // 2 for node in range(nodes)] for _ in range(rows)]
    many = [[node - 1 if node % 7 else -1 for node in range(64 + 2)]]
    return {
        "padding, window": plain.windowed(12),
        "right padding": AttentionStructure.causal(_padded(rows, tokens).flip(-1)),
        "segments, window, padding": plain.segments(_segments(tokens)).windowed(20),
        "documents": plain.documents(torch.arange(tokens).div(17, rounding_mode="floor")[None] + 1),
        "prefix": plain.spans((torch.arange(tokens) < 20)[None].int()),
        "part": one.segments(_segments(tokens)).part(30, tokens),
        "tree": AttentionStructure.tree(_padded(rows, tokens - nodes), parents),
        "tree of many": AttentionStructure.tree(torch.ones(1, 10), many),
    }


def _arguments(name: str) -> Any:
    structure = structures()[name]
    return structure, kernel_arguments(structure, 128 if name == "tree of many" else 32)


@pytest.fixture(params=list(structures()))
def structured(request: pytest.FixtureRequest) -> Any:
    """A structure, and its kernel arguments with tables coarser than what the interpreter works on."""
    return _arguments(request.param)


@pytest.fixture(params=["segments, window, padding", "tree", "tree of many"])
def varied(request: pytest.FixtureRequest) -> Any:
    """As `structured`, but only as many as have everything among them."""
    return _arguments(request.param)


@pytest.fixture
def mixed() -> Any:
    """The kernel arguments of a structure with segments, padding and a window."""
    return kernel_arguments(structures()["segments, window, padding"], 32)

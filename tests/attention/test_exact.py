"""Attention in blocks of queries is what float64 says, whatever is asked of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.attention import AttentionStructure
from hf_ext.attention.exact import attend

ROWS, HEADS, KEY_HEADS, LENGTH, WIDTH = 2, 6, 2, 19, 8


def inputs(dtype: torch.dtype = torch.float32, queries: int = LENGTH) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = [(ROWS, HEADS, queries, WIDTH), (ROWS, KEY_HEADS, LENGTH, WIDTH), (ROWS, KEY_HEADS, LENGTH, WIDTH + 1)]
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def slow(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, cap: float | None,
    sinks: torch.Tensor | None, added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output, log-sum-exp and column sums, row by row in float64."""
    query, key, value = (part.double() for part in (query, key, value))
    outs, logs = (
        torch.zeros(ROWS, HEADS, query.shape[2], value.shape[3]).double(),
        torch.zeros(query.shape[:3]).double(),
    )
    sums = torch.zeros(ROWS, KEY_HEADS, LENGTH).double()
    for r in range(ROWS):
        for h in range(HEADS):
            group = h // (HEADS // KEY_HEADS)
            for q in range(query.shape[2]):
                scores = key[r, group] @ query[r, h, q] * 0.3
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                if added is not None:
                    scores = scores + added.expand(ROWS, HEADS, -1, -1)[r, h, q].double()
                powers = torch.where(seen.expand(ROWS, HEADS, -1, -1)[r, h, q], scores.exp(), 0.0)
                total = powers.sum() + (0 if sinks is None else sinks[h].double().exp())
                share = powers / total if total > 0 else powers
                outs[r, h, q], logs[r, h, q] = share @ value[r, group], total.log()
                sums[r, group] += share
    return outs, logs, sums


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.equal(found.isneginf(), expected.isneginf())
    return float((found.double() - expected).nan_to_num(neginf=0).abs().max())


MASKS: dict[str, Any] = {
    "none": None,
    "left padding": AttentionStructure.causal(torch.arange(LENGTH) >= torch.tensor([[0], [7]])),
    "segments": AttentionStructure.causal(torch.ones(1, LENGTH)).segments(
        torch.tensor([[0] * 4 + [1] * 5 + [2] * 6 + [0] * 4])
    ),
}


@pytest.mark.parametrize("entries", [1, 3 * ROWS * HEADS * LENGTH, 2**22])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("mask", MASKS)
def test_outputs_and_statistics_in_blocks_of_any_size(mask: str, cap: float | None, sinks: bool, entries: int) -> None:
    query, key, value = inputs()
    sink = torch.linspace(-2, 3, HEADS) if sinks else None
    given = MASKS[mask]
    for form in [given] if given is None else [given, given.dense()]:
        found = attend(query, key, value, mask=form, causal=form is None, scale=0.3, softcap=cap, sinks=sink,
                       lse=True, column_sums=True, entries=entries)  # fmt: skip
        seen = torch.ones(1, 1, LENGTH, LENGTH).tril().bool() if given is None else given.dense()
        output, lse, sums = slow(query, key, value, seen, cap, sink)
        assert found.output is not None
        assert found.lse is not None
        assert found.column_sums is not None
        asked = seen.any(-1)[..., None]  # a query that sees nothing gets what eager attention gives it
        difference = largest(found.output * asked, output * asked)
        assert difference < 1e-5, f"output: {difference}"
        difference = largest(found.lse, lse)
        assert difference < 1e-5, f"log-sum-exp: {difference}"
        difference = largest(found.column_sums, sums)
        assert difference < 3e-5, f"column sums: {difference}"
        assert abs(float(found.column_sums.sum()) - float(sums.sum())) < 1e-3


def test_an_additive_mask_of_every_head_is_added_and_hides() -> None:
    query, key, value = inputs(queries=4)
    added = torch.randn(1, HEADS, 4, LENGTH, generator=torch.Generator().manual_seed(5))
    added[:, :, :, 3:6] = torch.finfo(torch.float32).min
    output, lse, sums = slow(query, key, value, added > -100, None, None, added)
    found = attend(query, key, value, mask=added, scale=0.3, lse=True, column_sums=True)
    for name, one, other in (
        ("output", found.output, output),
        ("lse", found.lse, lse),
        ("sums", found.column_sums, sums),
    ):
        assert one is not None
        assert largest(one, other) < 1e-5, name


@pytest.mark.parametrize("mask", ["none", "left padding"])
def test_gradients_of_every_input_are_those_of_float64(mask: str) -> None:
    parts = [*inputs(torch.float64), torch.linspace(-1, 1, HEADS).double()]
    given = MASKS[mask]
    for part in parts:
        part.requires_grad_()

    def run(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        return attend(query, key, value, mask=given, causal=given is None, softcap=2.0, sinks=sinks).output

    # The scores are float32 inside, as eager attention has them: finite differences must be coarse.
    direction = [torch.randn(part.shape, generator=torch.Generator().manual_seed(i)).double()
                 for i, part in enumerate(parts)]  # fmt: skip
    weight = torch.randn(ROWS, HEADS, LENGTH, WIDTH + 1, generator=torch.Generator().manual_seed(9)).double()
    gradients = torch.autograd.grad((run(*parts) * weight).sum(), parts)
    for i, (gradient, way) in enumerate(zip(gradients, direction, strict=True)):
        assert gradient.isfinite().all()
        step = 1e-3
        with torch.no_grad():
            sides = [(run(*[p + s * step * way if j == i else p for j, p in enumerate(parts)]) * weight).sum()
                     for s in (1, -1)]  # fmt: skip
        slope = float(sides[0] - sides[1]) / (2 * step)
        assert abs(slope - float((gradient * way).sum())) < 2e-2 * max(abs(slope), 1), f"input {i}"


def test_memory_of_statistics_is_linear_in_the_length() -> None:
    """No tensor that is made is as large as the matrix."""
    length = 256
    query, key = (torch.zeros(1, heads, length, 4) for heads in (2, 1))
    structure = AttentionStructure.causal(torch.ones(1, length))
    largest_made = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest_made
            made = function(*args, **(kwargs or {}))
            for part in made if isinstance(made, tuple | list) else [made]:
                if isinstance(part, torch.Tensor):
                    largest_made = max(largest_made, part.numel())
            return made

    with Watch():
        found = attend(
            query, key, key, mask=structure, output=False, lse=True, column_sums=True, entries=8 * 2 * length
        )
    assert found.column_sums is not None
    assert largest_made <= 8 * 2 * length, f"a tensor of {largest_made} entries was made"
    assert abs(float(found.column_sums.sum()) - 2 * length) < 1e-3

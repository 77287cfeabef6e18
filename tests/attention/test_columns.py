"""Column sums in blocks equal those of the definition."""

from __future__ import annotations

import pytest
import torch

from hf_ext.attention import columns
from hf_ext.attention.columns import column_sums
from hf_ext.attention.exact import attend

CASES = {
    "plain": {},
    "causal": {"causal": True},
    "softcap": {"causal": True, "softcap": 2.0},
    "sinks": {"causal": True, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "scale": {"scale": 0.7},
}


@pytest.mark.parametrize("entries", [1, 300, 2**20])
@pytest.mark.parametrize("case", CASES)
def test_blocks_of_any_size_give_the_sums_of_the_definition(case, entries):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 37, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, 37, 8, generator=generator, dtype=torch.float64)
    found = column_sums(query, key, entries=entries, **CASES[case])
    wanted = attend(query, key, key, output=False, column_sums=True, **CASES[case]).column_sums
    gap = (found - wanted).abs().max().item()
    assert gap < 1e-5, f"the largest difference is {gap:.2e}"


@pytest.mark.parametrize("entries", [1, 500, 2**20])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_any_form(additive, heads, entries):
    """Fewer queries than keys, a row that sees nothing, masks of each head or of all."""
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, 4, 9, 8, generator=generator), torch.randn(2, 2, 31, 8, generator=generator)
    mask = torch.rand(2, heads, 9, 31, generator=generator) < 0.4
    mask[1, :, 3] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    found = column_sums(query, key, mask=given, entries=entries)
    wanted = attend(query, key, key, mask=mask, output=False, column_sums=True).column_sums
    gap = (found - wanted).abs().max().item()
    assert gap < 1e-5, f"the largest difference is {gap:.2e}"
    assert abs(found.sum().item() - (2 * 4 * 9 - 4)) < 1e-3


@pytest.mark.parametrize("entries", [1, 300, 2**20])
@pytest.mark.parametrize("case", CASES)
def test_attention_comes_with_the_sums(case, entries):
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, heads, 37, 8, generator=generator) for heads in (4, 2, 2))
    output, sums = columns.attend(query, key, value[..., :5], entries=entries, **CASES[case])
    wanted = attend(query, key, value[..., :5], column_sums=True, **CASES[case])
    gaps = (output - wanted.output).abs().max().item(), (sums - wanted.column_sums).abs().max().item()
    assert max(gaps) < 1e-5, f"the largest differences are {gaps}"
    mask = torch.rand(2, 4, 37, 37, generator=generator) < 0.5
    mask[0, 0, 3] = False
    output, _ = columns.attend(query, key, value, mask=mask, entries=entries)
    wanted = attend(query, key, value, mask=mask)
    seen = mask.any(-1)
    gap = (output - wanted.output).abs()[seen].max().item()
    assert gap < 1e-5, f"the largest difference is {gap:.2e}"
    assert not output[~seen].any()

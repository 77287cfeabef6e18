"""Codes in bytes, and keys and values as codes."""

from __future__ import annotations

import pytest
import torch

from hf_ext.kernels.packing import (
    BITS,
    dequantise_keys,
    dequantise_values,
    pack,
    quantise_keys,
    quantise_values,
    unpack,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def numbers(shape: tuple[int, ...] = (2, 3, 64, 32), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return numbers with channels that are off zero, small and large, as keys have."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(shape, generator=generator, dtype=torch.float64)
    made = made * torch.logspace(-3, 2, shape[-1], dtype=torch.float64)
    return (made + 20 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_packed_comes_back_bit_for_bit(bits: int) -> None:
    every = torch.arange(2**bits, dtype=torch.uint8).repeat(3, 5, 4)
    codes = every[..., torch.randperm(every.shape[-1], generator=torch.Generator().manual_seed(1))]
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, codes.shape[-1] * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)
    assert torch.equal(unpack(pack(codes.mT, 8), 8), codes.mT)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_is_some_codes(bits: int) -> None:
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(pack(unpack(every, bits), bits), every)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_no_number_is_off_by_more_than_half_a_step(bits: int, stored: torch.dtype | None, dtype: torch.dtype) -> None:
    given = numbers(dtype=dtype)
    for quantise, dequantise, axis in (
        (quantise_keys, dequantise_keys, 2),
        (quantise_values, dequantise_values, 3),
    ):
        packed = quantise(given, bits, 16, stored)
        assert packed.scale.dtype == packed.zero.dtype == (stored or dtype)
        # In float64 there is nothing but the error of the codes.
        back = dequantise(*packed, bits=bits, dtype=torch.float64)
        step = packed.scale.double().repeat_interleave(16, axis)
        excess = ((back - given.double()).abs() - step / 2) / given.double().abs().clamp_min(1e-3)
        rounding = 2.0**-40 if dtype == torch.float64 else 2.0**-22  # of the arithmetic in which codes are found
        assert excess.max() < rounding, f"off by {excess.max():.2e} more than half a step, relative to the number"


def test_numbers_less_than_the_least_that_the_scale_can_be_are_off_by_no_more_either() -> None:
    given = torch.tensor([-1e-9, 0.0, 1e-9, 2e-9]).view(1, 1, 4, 1).expand(1, 1, 4, 4)
    packed = quantise_keys(given, 2, 4, torch.float16)
    assert (packed.zero < 0).all()
    off = (dequantise_keys(*packed, bits=2, dtype=torch.float64) - given).abs()
    assert (off <= packed.scale.double() / 2).all(), off.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_scale_is_hardly_more_than_it_must_be(dtype: torch.dtype) -> None:
    given = numbers(dtype=dtype)
    packed = quantise_keys(given, 4, 16)
    groups = given.double().unflatten(2, (-1, 16))
    least = (groups.amax(3) - groups.amin(3)) / 15
    assert (packed.scale.double() >= least * (1 - 1e-6)).all()
    assert (packed.scale.double() <= least * (1 + 4 * torch.finfo(dtype).eps) + 1e-7).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_of_one_number_is_exact(dtype: torch.dtype, bits: int) -> None:
    constant = numbers((1, 2, 1, 32), dtype)
    keys = constant.expand(1, 2, 32, 32)
    assert torch.equal(dequantise_keys(*quantise_keys(keys, bits, 16), bits=bits), keys)
    values = constant.mT.expand(1, 2, 32, 32)
    assert torch.equal(dequantise_values(*quantise_values(values, bits, 8), bits=bits), values)


@pytest.mark.parametrize("bits", BITS)
def test_as_many_numbers_as_there_are_codes_are_exact(bits: int) -> None:
    steps = torch.arange(2**bits).float().repeat(64)[:64] * 0.25 - 3
    keys = steps.view(1, 1, 64, 1).expand(1, 1, 64, 8)
    if bits < 8:  # 64 numbers are not enough for all codes of 8 bits
        assert torch.equal(dequantise_keys(*quantise_keys(keys, bits, 64), bits=bits), keys)
    assert torch.equal(quantise_keys(keys, bits, 64).zero, torch.full((1, 1, 1, 8), -3.0))


def test_tokens_are_quantised_alike_alone_and_with_others() -> None:
    """Which is what lets a cache append: nothing that is packed changes any more."""
    given = numbers()
    whole = quantise_keys(given, 4, 16), quantise_values(given, 4, 16)
    for start in (0, 16, 48):
        part = given[:, :, start : start + 16]
        for axis, (packed, alone) in enumerate(
            zip(whole, (quantise_keys(part, 4, 16), quantise_values(part, 4, 16)), strict=True)
        ):
            assert torch.equal(packed.codes[:, :, start : start + 16], alone.codes)
            kept = slice(start // 16, start // 16 + 1) if axis == 0 else slice(start, start + 16)
            assert torch.equal(packed.scale[:, :, kept], alone.scale)
            assert torch.equal(packed.zero[:, :, kept], alone.zero)


def test_no_tokens_are_quantised_to_none() -> None:
    empty = torch.zeros(2, 3, 0, 32)
    keys, values = quantise_keys(empty, 2, 16), quantise_values(empty, 2, 16)
    assert [tuple(tensor.shape) for tensor in keys] == [(2, 3, 0, 8), (2, 3, 0, 32), (2, 3, 0, 32)]
    assert [tuple(tensor.shape) for tensor in values] == [(2, 3, 0, 8), (2, 3, 0, 2), (2, 3, 0, 2)]
    assert dequantise_keys(*keys, bits=2).shape == dequantise_values(*values, bits=2).shape == empty.shape


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 4, 8\), got 3"):
        quantise_keys(numbers(), 3, 16)
    with pytest.raises(ValueError, match="64 tokens are no multiple of groups of 24"):
        quantise_keys(numbers(), 4, 24)
    with pytest.raises(ValueError, match="a width of 32 is no multiple of groups of 24"):
        quantise_values(numbers(), 4, 24)
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        pack(torch.zeros(3, 6, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="codes must be uint8"):
        pack(torch.zeros(3, 8, dtype=torch.int64), 2)

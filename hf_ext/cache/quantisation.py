"""What a quantised cache is told: bits, groups, and how many tokens stay in full precision.

Source: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv:2402.02750), section 3. Some channels of
keys are large for all tokens, so keys are quantised channel by channel, in groups of tokens; values have no such
channels and are quantised token by token, in groups of channels. The last tokens stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ext.kernels.packing import BITS, Packed, quantise_keys, quantise_values


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How a cache packs what is older than its last tokens.

    Tokens are packed in groups, keys and values of the same tokens together: as soon as `group` more than
    `residual` tokens are held in full precision, the oldest of them are packed. What is packed is never packed again.
    (KIVI packs values one by one, and keys when `residual` of them have come; here no less stays in full precision
    than there, and never fewer than `residual` tokens.)

    Args:
        bits: of a code: 2, 4 or 8.
        group: tokens of a group of keys, each channel of which has its own scale.
        channels: channels of a group of values at most, each token of which has its own scale. A width that is no
            multiple gets the largest smaller groups that it is a multiple of.
        residual: so many last tokens stay in full precision.
        guard: whether to measure at the first prefill what becomes of attention with these keys, and to warn where
            little survives (`hf_ext.cache.sensitivity`).

    Raises:
        ValueError: an option that is not of the form above.

    Example:
        >>> Quantisation(bits=2).packed_of(1000), Quantisation(bits=2, residual=64).packed_of(1000)
        (864, 928)
    """

    bits: int = 4
    group: int = 32
    channels: int = 32
    residual: int = 128
    guard: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS or isinstance(self.bits, bool):
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")
        for name, least in (("group", 1), ("channels", 1), ("residual", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int from {least}, got {value!r}")

    def packed_of(self, tokens: int) -> int:
        """Return how many of so many tokens are packed."""
        return max(tokens - self.residual, 0) // self.group * self.group

    def channels_of(self, width: int) -> int:
        """Return the channels of a group of values of some width: the largest divisor up to `channels`.

        Example:
            >>> Quantisation(channels=32).channels_of(80)
            20
        """
        return next(size for size in range(min(self.channels, width), 0, -1) if width % size == 0)

    def check_widths(self, *widths: int) -> None:
        """Raise unless codes of heads of these widths fill whole bytes.

        Raises:
            ValueError: they do not.
        """
        for width in widths:
            if width % (8 // self.bits):
                raise ValueError(
                    f"{width} codes of {self.bits} bits, one for each channel of a head, do not fill whole bytes; use "
                    f"{'bits=8' if width % 2 else 'bits=4 or bits=8'}"
                )

    def entry_bits(self, width: int, value_width: int, itemsize: int) -> float:
        """Return the bits of a packed entry of one head: codes of key and value, and its part of scales and zeros."""
        scales = 2 * 8 * itemsize * (width / self.group + value_width / self.channels_of(value_width))
        return self.bits * (width + value_width) + scales


def pack(keys: Tensor, values: Tensor, real: Tensor | None, quantisation: Quantisation) -> tuple[Packed, Packed]:
    """Quantise entries; what stands for nothing has no say in the scales of others.

    Args:
        keys: `(rows, key heads, n, width)`, `n` a multiple of the groups.
        values: `(rows, key heads, n, value width)`.
        real: `(rows, key heads, n)` bool, False for what stands for nothing; None if nothing does.
        quantisation: bits and groups.

    Returns:
        Packed keys and values.

    Example:
        >>> keys = torch.tensor([9.0, 1.0, 2.0, 4.0]).view(1, 1, 4, 1).expand(1, 1, 4, 2)
        >>> real = torch.tensor([False, True, True, True]).view(1, 1, 4)
        >>> found, _ = pack(keys, keys, real, Quantisation(bits=4, group=4))
        >>> found.zero.flatten(), found.scale.flatten() * 15
        (tensor([1., 1.]), tensor([3., 3.]))
    """
    keys, values = keys.detach(), values.detach()
    if real is not None:
        grouped = keys.unflatten(2, (-1, quantisation.group))
        there = real.unflatten(2, (-1, quantisation.group))
        # Any real key of the group can stand in for the others: the least and the greatest numbers stay.
        first = there.to(torch.uint8).argmax(-1)[..., None, None].expand(-1, -1, -1, 1, keys.shape[-1])
        keys = torch.where(there[..., None], grouped, grouped.gather(3, first)).flatten(2, 3)
    return (
        quantise_keys(keys, quantisation.bits, quantisation.group),
        quantise_values(values, quantisation.bits, quantisation.channels_of(values.shape[-1])),
    )

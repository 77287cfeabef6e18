"""Draw tokens by their law, several times faster than `torch.multinomial` on a CPU."""

from __future__ import annotations

import torch


def draw_tokens(laws: torch.Tensor) -> torch.Tensor:
    """Draw a token from each row's law, by inverting its cumulative sum in float64.

    A token without probability is never drawn.

    Args:
        laws: `(rows, vocabulary)` probabilities; they need not sum to exactly 1.

    Returns:
        `(rows,)` int64.

    Example:
        >>> draw_tokens(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]))
        tensor([1, 2])
    """
    return draw_several(laws, 1)[:, 0]


def draw_several(laws: torch.Tensor, count: int) -> torch.Tensor:
    """Draw `count` tokens from each row's law, independently; `(rows, count)` int64.

    Args:
        laws: `(rows, vocabulary)` probabilities.
        count: tokens a row.

    Example:
        >>> draw_several(torch.tensor([[0.0, 1.0, 0.0]]), 3)
        tensor([[1, 1, 1]])
    """
    wide = torch.float32 if laws.device.type == "mps" else torch.float64
    sums = laws.to(wide).cumsum(-1)
    total = sums[:, -1:]
    # Below the total even after rounding, so that some sum lies above; the first that does belongs to a possible token.
    chance = torch.rand_like(total.expand(-1, count))
    place = torch.minimum(chance * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, place.contiguous(), right=True)

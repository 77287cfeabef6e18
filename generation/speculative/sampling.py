"""Draw one token a row, several times faster than `torch.multinomial` on a CPU."""

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
    wide = torch.float32 if laws.device.type == "mps" else torch.float64
    sums = laws.to(wide).cumsum(-1)
    total = sums[:, -1:]
    # Below the total even after rounding, so that some sum lies above; the first that does belongs to a possible token.
    place = torch.minimum(torch.rand_like(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, place, right=True)[:, 0]

"""How many tokens a budget is."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Against `0.29 * 100 == 28.999999999999996`.
_ROUNDING = 1e-9


def check_budget(budget: int | float) -> None:
    """Raise unless a budget is a number of tokens or a share of them.

    Args:
        budget: tokens when an int (at least 1), a share when a float (above 0, up to 1).

    Raises:
        ValueError: it is neither.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(f"budget must be tokens (an int) or a share of them (a float up to 1.0), got {budget!r}")
    if isinstance(budget, int) and budget < 1:
        raise ValueError(f"a budget in tokens must be at least 1, got {budget}")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(
            f"a budget as a share must be above 0.0 and at most 1.0, got {budget}; tokens are given as an int"
        )


def tokens_of(budget: int | float, seen: Sequence[int]) -> list[int]:
    """Return how many tokens of each row may be kept, at least one, and never more than were seen.

    Args:
        budget: tokens when an int, a share when a float, rounded down.
        seen: real tokens of each row so far.

    Example:
        >>> tokens_of(0.29, [100, 7]), tokens_of(20, [100, 7])
        ([29, 2], [20, 7])
    """
    if isinstance(budget, int):
        return [min(budget, count) for count in seen]
    return [min(max(math.floor(count * budget + _ROUNDING), 1), count) for count in seen]

"""More budget for the lower layers, less for the upper ones."""

from __future__ import annotations

from dataclasses import dataclass

from hf_ext.cache.policies.snapkv import SnapKV


@dataclass(kw_only=True)
class PyramidKV(SnapKV):
    """`SnapKV` with budgets that fall from layer to layer, as attention narrows towards the upper layers.

    The budgets are an arithmetic sequence whose mean is `budget` and whose last member is the `slope`-th part of it,
    and no less than the window needs.

    Source: PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (arXiv:2406.02069),
    section 4.2.

    Args:
        budget: what each head may keep on average over the layers; see `CachePolicy`.
        slope: how many times the budget of the last layer goes into the mean one; 1 for the same in all.
        window: see `SnapKV`, as for `kernel` and `when`.

    Raises:
        ValueError: an option that is not of the form above.

    Example:
        >>> [PyramidKV(budget=100, window=4).layer_budget(layer, 5) for layer in range(5)]
        [195, 147, 100, 52, 5]
        >>> PyramidKV(budget=0.75, slope=2).layer_budget(0, 2)
        1.0
    """

    slope: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.slope, bool) or not isinstance(self.slope, int | float) or self.slope < 1:
            raise ValueError(f"slope must be a number from 1.0, got {self.slope!r}")

    def layer_budget(self, layer: int, layers: int) -> int | float:
        """Return the budget of a layer; they sum up to no more than `budget` times the layers."""
        if layers == 1:
            return self.budget
        least = self.budget / self.slope
        if isinstance(self.budget, int):
            least = min(max(least, self.window + 1), self.budget)
        else:
            least = max(least, 2 * self.budget - 1)  # the first layer cannot keep more than everything
        share = (2 * self.budget - least) - 2 * (self.budget - least) * layer / (layers - 1)
        return int(share + 1e-9) if isinstance(self.budget, int) else min(share, 1.0)

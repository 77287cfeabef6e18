"""Averages that an objective logs, kept on the device until they are read."""

from __future__ import annotations

import torch
from torch import Tensor


class Meters:
    """Sums and counts by name; reading them averages over micro-batches, steps and processes.

    Example:
        >>> meters = Meters()
        >>> meters.add("loss", torch.tensor(6.0), 2)
        >>> meters.add("loss", torch.tensor(3.0), 1)
        >>> meters.drain()
        {'loss': 3.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add a sum over `count` items. Does not synchronise the device."""
        total = total.detach().float()
        pair = torch.stack((total, torch.as_tensor(count, dtype=total.dtype, device=total.device)))
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def drain(self) -> dict[str, float]:
        """Return the averages over all processes and start again.

        Every process must call it at the same step and hold the same names.
        """
        averages = {}
        for name, pair in sorted(self._sums.items()):
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(pair)
            total, count = pair.tolist()
            if count:
                averages[name] = total / count
        self._sums.clear()
        return averages

    def clear(self) -> None:
        """Forget what was added."""
        self._sums.clear()

"""What attention did, without its matrix: log-sum-exp rows and column sums of every layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hf_ext import adapter
from hf_ext.attention.backend import STATISTICS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CallStatistics:
    """Of one call of one layer's attention.

    Args:
        layer: number of the layer.
        lse: `(rows, heads, queries)` float32, the logarithm of the sum of the exponentiated scores of what each
            query sees (and of the layer's sink); None if it was not asked for.
        column_sums: `(rows, key heads, keys)` float32, how much probability each key got from all queries and
            all heads of its group; None if it was not asked for.
    """

    layer: int
    lse: torch.Tensor | None = None
    column_sums: torch.Tensor | None = None


@dataclass
class Statistics:
    """What `collect` has collected so far.

    Args:
        lse: whether log-sum-exp rows are collected.
        column_sums: whether column sums are collected.
        calls: all calls since `clear`, in order.
    """

    lse: bool = True
    column_sums: bool = True
    calls: list[CallStatistics] = field(default_factory=list)

    def __getitem__(self, layer: int) -> CallStatistics:
        """Return the last call of a layer."""
        for call in reversed(self.calls):
            if call.layer == layer:
                return call
        raise KeyError(f"layer {layer} has not attended; there are {sorted({call.layer for call in self.calls})}")

    def clear(self) -> None:
        """Forget what was collected."""
        self.calls.clear()


@contextmanager
def collect(model: PreTrainedModel, lse: bool = True, column_sums: bool = True) -> Iterator[Statistics]:
    """Collect statistics of a model's attention while it runs.

    Outputs stay what they are. With gradient checkpointing a layer attends twice, and is collected twice.

    Args:
        model: a model with `attn_implementation="hf_ext"`.
        lse: whether to collect log-sum-exp rows.
        column_sums: whether to collect column sums.

    Yields:
        The statistics, which grow with every call.

    Raises:
        ValueError: the model attends in another way, or its statistics are being collected already.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.build("llama")
        >>> model.set_attn_implementation("hf_ext")
        >>> with collect(model) as statistics, torch.no_grad():
        ...     _ = model(torch.tensor([[5, 6, 7]]))
        >>> statistics[1].lse.shape, statistics[1].column_sums.shape
        (torch.Size([1, 4, 3]), torch.Size([1, 2, 3]))
        >>> float(statistics[1].column_sums.sum())  # three queries of four heads
        12.0
    """
    implementation = adapter.attention_implementation(model)
    if implementation != "hf_ext":
        raise ValueError(
            f"statistics are collected by attn_implementation='hf_ext', this model has {implementation!r}; call "
            "model.set_attn_implementation('hf_ext')"
        )
    modules = list(model.modules())
    if any(STATISTICS in module.__dict__ for module in modules):
        raise ValueError("statistics of this model are being collected already")
    found = Statistics(lse, column_sums)
    for module in modules:
        module.__dict__[STATISTICS] = found
    try:
        yield found
    finally:
        for module in modules:
            module.__dict__.pop(STATISTICS, None)

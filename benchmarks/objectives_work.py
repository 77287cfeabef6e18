"""What a training step computes: tokens that models read, and products that they make."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


class Work:
    """Counts the tokens that models read and the FLOPs of matrix products and attentions, in training and beside it.

    A causal attention counts the pairs of tokens that it looks at. Not counted: sums, softmaxes and what else reads or
    writes numbers one by one.

    Example:
        >>> with Work() as work:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> work.flops
        60
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._counter = FlopCounterMode(display=False, custom_mapping=_on_cpu())

    def __enter__(self) -> Work:
        """Begin to count."""
        self._handle = torch.nn.modules.module.register_module_forward_pre_hook(self._note)
        self._counter.__enter__()
        return self

    def __exit__(self, *given: Any) -> None:
        """Stop counting."""
        self._handle.remove()
        self._counter.__exit__(*given)

    @property
    def flops(self) -> int:
        """What was counted."""
        return int(self._counter.get_total_flops())

    def _note(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and args and args[0].dtype == torch.long:
            self.tokens += args[0].numel()


def _on_cpu() -> dict[Any, Any]:
    """Return formulas of the attention of CPUs, which torch's counter does not know."""
    found = {}
    for suffix, first, products, causal in (("", 0, 2, 4), ("_backward", 1, 5, 7)):
        operator = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}", None)
        if operator is not None:
            found[operator] = _formula(first, products, causal)
    return found


def _formula(first: int, products: int, causal: int) -> Any:
    def flops(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
        rows, heads, queries, width = shapes[first]
        keys = shapes[first + 1][2]
        total = products * 2 * rows * heads * queries * keys * width
        return total * (queries + 1) // (2 * queries) if len(shapes) > causal and shapes[causal] else total

    return flops

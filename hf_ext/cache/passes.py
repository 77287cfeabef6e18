"""What is left of a pass over one layer of a compressed cache, for its policy and for layers that share keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext.attention.packed import is_packed, unpack

#: Runs attention on plain tensors; see `CompressedLayer.attend`.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None, Tensor | None]]


@dataclass
class Pass:
    """What is left of a forward pass until the policy has looked at it.

    Args:
        count: tokens.
        queries: `(rows, heads, q, width)`, those of its queries that the policy wants.
        real: `(rows, q)` bool, False for queries of padding; None if there is none.
        column_sums: `(rows, key heads, n)`, what each entry got from the queries of this pass.
        scale: of the scores.
        softcap: of the scores.
        sinks: `(heads,)` scores of the attention sinks.
        module: the attention layer.
    """

    count: int
    queries: Tensor | None = None
    real: Tensor | None = None
    column_sums: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    sinks: Tensor | None = None
    module: nn.Module | None = None

    def forget(self, count: int) -> None:
        """Leave out its last tokens."""
        self.count -= count
        self.queries = None if self.queries is None else self.queries[:, :, :-count]
        self.real = None if self.real is None else self.real[:, :-count]


@dataclass
class Attended:
    """What a layer attended to in a pass, for layers of models that share its keys; it goes when the keys go.

    Args:
        layer: number of the layer in the model.
        policy: name of the policy.
        count: queries of the pass.
        what: keys, values and mask; None if there is nothing left of them by now.
    """

    layer: int
    policy: str
    count: int
    what: tuple[Tensor, Tensor, Tensor | None] | None = None

    def attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, scale: float | None, attend: Attend, *_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with the queries of another layer; see `CompressedLayer.attend`.

        Raises:
            ValueError: what was attended to was not plain tensors.
        """
        if self.what is None:
            raise ValueError(
                f"another layer attends to the keys of layer {self.layer}, too, and {self.policy} packs or merges "
                "them, keeps other tokens in every head or decides for every query: use a policy that does none of it "
                "for models whose layers share keys"
            )
        keys, values, mask = self.what
        count, held = query.shape[2], keys.shape[2]
        if count < self.count:  # the model goes on with its last queries alone
            if mask is None and count > 1:
                mask = torch.ones(count, held, dtype=torch.bool, device=query.device).tril(held - count)[None, None]
            elif mask is not None:
                mask = (unpack(mask, self.count, held).dense() if is_packed(mask) else mask)[..., -count:, :]
        return attend(query, keys, values, mask, False)[:2]

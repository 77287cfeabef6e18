"""Share a layer's budget among its heads as their scores deserve."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_ext.cache.entries import Entries
from hf_ext.cache.policies.snapkv import SnapKV
from hf_ext.cache.policy import CachePolicy, Seen

#: Options of every policy, which are those of the policy inside unless they are given.
SHARED = tuple(f.name for f in dataclasses.fields(CachePolicy))


@dataclass(kw_only=True)
class AdaKV(CachePolicy):
    """Let the heads of a layer compete for its budget, by the scores of any other policy.

    Every head keeps its best entries up to a `floor`; the rest of the layer's budget goes to the best entries
    of all heads together. Heads hold different numbers of entries, and what a head does not hold takes no memory.

    Source: Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference
    (arXiv:2407.11550), algorithm 1.

    Args:
        policy: whose scores count; those of different heads must be of the same kind, as shares of attention are.
        floor: share of a head's mean budget that each head has for certain, from 0.0 up to 1.0.
        budget: what each head may keep on average; that of `policy` by default. So are `sinks`, `window`, `when` and
            `interval`: see `CachePolicy`.

    Raises:
        ValueError: an option that is not of the form above, or a policy that does more than to score.

    Example:
        >>> import torch
        >>> from hf_ext.cache import CompressedCache
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.build("llama").eval()
        >>> model.set_attn_implementation("hf_ext")
        >>> cache = CompressedCache(model.config, AdaKV(policy=SnapKV(budget=8, window=2)))
        >>> _ = model(torch.arange(1, 21)[None], past_key_values=cache)
        >>> int(cache.entries(0).real.sum())  # of two key heads
        16
    """

    policy: CachePolicy = field(default_factory=SnapKV)
    floor: float = 0.2
    budget: Any = None
    sinks: Any = None
    window: Any = None
    when: Any = None
    interval: Any = None

    storage: ClassVar[Literal["dense", "ragged"]] = "ragged"

    def __post_init__(self) -> None:
        inner = self.policy
        if not isinstance(inner, CachePolicy):
            raise ValueError(f"policy must be a cache policy such as SnapKV(budget=0.25), got {inner!r}")
        kind = type(inner)
        plain = kind.storage == "dense" and kind.compress is CachePolicy.compress
        if not plain or kind.biased or kind.gated or inner.quantise() is not None:
            raise ValueError(f"policy must be one that scores entries and no more; {kind.__name__} does more")
        if isinstance(self.floor, bool) or not isinstance(self.floor, int | float) or not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be a share of the budget from 0.0 to 1.0, got {self.floor!r}")
        given = {name: getattr(self, name) for name in SHARED if getattr(self, name) is not None}
        self.policy = dataclasses.replace(inner, **given) if given else inner
        for name in SHARED:
            setattr(self, name, getattr(self.policy, name))
        super().__post_init__()

    @property
    def queries(self) -> int:  # type: ignore[override]
        """The queries that the policy inside wants."""
        return self.policy.queries

    @property
    def column_sums(self) -> bool:  # type: ignore[override]
        """Whether the policy inside wants column sums."""
        return self.policy.column_sums

    @property
    def adds(self) -> str:  # type: ignore[override]
        """The field that the policy inside adds column sums to."""
        return self.policy.adds

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Return the scores of the policy inside."""
        return self.policy.scores(entries, seen)

    def observe(self, entries: Entries, seen: Seen) -> Mapping[str, Tensor]:
        """Return the fields of the policy inside."""
        return self.policy.observe(entries, seen)

    def field_names(self) -> tuple[str, ...]:
        """Return the names of the fields of the policy inside."""
        return self.policy.field_names()

    def layer_budget(self, layer: int, layers: int) -> int | float:
        """Return the budget that the policy inside gives a layer."""
        return self.policy.layer_budget(layer, layers)

    def last(self, keep: Tensor) -> Tensor:
        """Return how many last tokens the policy inside keeps."""
        return self.policy.last(keep)

    def slack(self, keep: int) -> int:
        """Return how many tokens too many the policy inside tolerates."""
        return self.policy.slack(keep)

    def head_budgets(self, scores: Tensor, keep: Tensor) -> Tensor:
        """Return how many of the layer's best entries each head has.

        Args:
            scores: `(rows, key heads, n)`, `inf` for what stays, `-inf` for what stands for nothing.
            keep: `(rows,)` mean budget of a head.

        Example:
            >>> scores = torch.tensor([[[9.0, 8.0, 7.0, 1.0], [2.0, 1.0, 0.5, 0.2]]])
            >>> AdaKV(floor=0.0).head_budgets(scores, torch.tensor([2]))
            tensor([[3, 1]])
            >>> AdaKV(floor=1.0).head_budgets(scores, torch.tensor([2]))
            tensor([[2, 2]])
        """
        heads, width = scores.shape[1:]
        certain = (keep.double() * self.floor + 1e-9).floor().long().clamp(min=1 if self.floor else 0)
        ranked = scores.sort(dim=-1, descending=True).values
        first = torch.arange(width, device=scores.device) < certain[:, None, None]
        ranked = ranked.masked_fill(first & (ranked > -torch.inf), torch.inf).flatten(1)
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        chosen = torch.arange(ranked.shape[1], device=scores.device) < (keep * heads)[:, None]
        taken = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, order, chosen) & (ranked > -torch.inf)
        return taken.unflatten(1, (heads, width)).sum(-1)

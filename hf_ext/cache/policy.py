"""What a cache policy is: it says what an entry is worth, the engine does the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_ext.cache.budget import check_budget
from hf_ext.cache.entries import NOTHING, Entries
from hf_ext.cache.quantisation import Quantisation

When = Literal["prefill", "decode", "both"]


@dataclass(frozen=True)
class Seen:
    """What a layer's attention has just done, for policies that need to know.

    Args:
        layer: number of the layer among those that are compressed.
        layers: number of layers that are compressed.
        queries: `(rows, heads, q, width)`, the last queries that the policy asked for, after rotation; None for a
            policy that needs none.
        query_columns: `(q,)` int64, the columns of these queries.
        query_real: `(rows, q)` bool, False for queries of padding.
        column_sums: `(rows, key heads, n)` float32, what each entry got of the attention of all new queries; None
            unless the policy needs it.
        scale: that scores are multiplied with.
        softcap: at which scores are capped softly, if the model does.
        window: how far the layer looks back, if it slides.
        module: the attention layer, None where the attention implementation does not tell.
        model_layer: number of the layer in the model, where layers that are not compressed count, too.
        sinks: `(heads,)` scores of the layer's learned attention sinks, if it has some.
    """

    layer: int
    layers: int
    queries: Tensor | None = None
    query_columns: Tensor | None = None
    query_real: Tensor | None = None
    column_sums: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    window: int | None = None
    module: nn.Module | None = None
    model_layer: int = 0
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """Which entries stay.

    Args:
        index: `(rows, key heads, k)` int64 into the entries, ascending, -1 (first) where a head keeps fewer.
    """

    index: Tensor


@dataclass(kw_only=True)
class CachePolicy:
    """Base of all policies. One that scores entries overrides `scores`; one that does more, `compress`.

    A policy is immutable while a cache uses it and holds nothing of a run: one object serves all layers and
    any number of caches. What belongs to an entry and has to follow it is a field (`observe`).

    Args:
        budget: what each head of each layer may keep of a row: tokens when an int, a share of the real tokens seen
            when a float.
        sinks: first tokens of a row that are never dropped.
        window: last tokens of a row that are never dropped.
        when: whether to drop at prefill (passes of several tokens), while decoding, or both.
        interval: while decoding, drop as soon as so many tokens are too many; by default a 64th of the budget,
            so that what is held stays near it.

    Raises:
        ValueError: an option that is not of the form above.
    """

    budget: int | float = 0.5
    sinks: int = 0
    window: int = 0
    when: When = "both"
    interval: int | None = None

    #: Queries that `scores` wants: 0 for none, -1 for those of the whole pass.
    queries: ClassVar[int] = 0
    #: Whether it wants `Seen.column_sums`; `observe` is called after every pass then.
    column_sums: ClassVar[bool] = False
    #: The field that column sums are added to after every pass, if that is all there is to observe.
    adds: ClassVar[str] = ""
    #: How entries are stored: all heads of a layer alike ("dense"), or each its own number ("ragged").
    storage: ClassVar[Literal["dense", "ragged"]] = "dense"
    #: Whether entries carry a field "bias" that attention adds to their scores.
    biased: ClassVar[bool] = False
    #: Whether it says, before attention, which entries each new query sees; `arriving` and `gate` are called then.
    gated: ClassVar[bool] = False
    #: The class of the only models it is for, if they have to be trained for it.
    only_for: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        for name in ("sinks", "window"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a number of tokens from 0, got {getattr(self, name)!r}")
        if self.when not in ("prefill", "decode", "both"):
            raise ValueError(f"when must be 'prefill', 'decode' or 'both', got {self.when!r}")
        if self.interval is not None and (not isinstance(self.interval, int) or self.interval < 1):
            raise ValueError(f"interval must be a number of tokens from 1, got {self.interval!r}")

    # What a method says about itself.

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Say what each entry is worth; the greater, the longer it stays.

        Args:
            entries: what the layer holds, the new tokens included.
            seen: what its attention has just done.

        Returns:
            `(rows, key heads, n)`; what stands for nothing, sinks and the window are seen to by the engine.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither scores nor compress")

    def observe(self, entries: Entries, seen: Seen) -> Mapping[str, Tensor]:
        """Return fields of the entries after a pass, such as the attention each one has got so far.

        Args:
            entries: what the layer holds, the new tokens included; their fields are 0.
            seen: what its attention has just done.

        Returns:
            `(rows, key heads, n)` each, by name; the same names always.
        """
        if not self.adds:
            return {}
        assert seen.column_sums is not None
        return {self.adds: entries.fields[self.adds] + seen.column_sums}

    def arriving(self, keys: Tensor, module: nn.Module) -> Mapping[str, Tensor]:
        """Return the fields of new tokens, for a policy that is `gated`; other fields begin with 0.

        Args:
            keys: `(rows, key heads, q, width)` of the new tokens.
            module: the attention layer.

        Returns:
            `(rows, key heads, q, ...)` each, by name; the same names always.
        """
        return {}

    def gate(self, entries: Entries, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Say which entries each new query sees, for a policy that is `gated`.

        Args:
            entries: what the layer holds, the new tokens included.
            seen: the pass: `query_columns` and `query_real` of all its queries, and the module.

        Returns:
            `(rows, 1, q, n)` bool, in addition to what the model's own mask hides; and fields, as `observe` returns
            them.
        """
        raise NotImplementedError(f"{type(self).__name__} is gated and defines no gate")

    def quantise(self) -> Quantisation | None:
        """Return how older entries are packed; they are not by default."""
        return None

    def field_names(self) -> tuple[str, ...]:
        """Return the names of the fields that entries carry."""
        return ("bias",) if self.biased else ()

    def layer_budget(self, layer: int, layers: int) -> int | float:
        """Return the budget of a layer, the same for all by default."""
        return self.budget

    def head_budgets(self, scores: Tensor, keep: Tensor) -> Tensor:
        """Share a layer's budget among its heads; for `storage = "ragged"`.

        Args:
            scores: `(rows, key heads, n)` with `inf` for what must stay and `-inf` for what stands for nothing.
            keep: `(rows,)` what a head may keep on average.

        Returns:
            `(rows, key heads)` int64 with a sum of at most `keep` times the heads in each row.
        """
        return keep[:, None].expand(-1, scores.shape[1])

    def last(self, keep: Tensor) -> Tensor:
        """Return how many of the last tokens of each row are never dropped, `(rows,)`; `window` by default.

        Args:
            keep: `(rows,)` what a head may keep.
        """
        return torch.full_like(keep, self.window)

    # What the engine does with it.

    def compress(self, entries: Entries, seen: Seen, keep: Tensor) -> Selection | Entries | None:
        """Return which entries stay or, for a policy that merges, the entries there are from now on.

        Called when there are more than the budget allows; for a `gated` policy after every pass. None changes nothing.

        Args:
            entries: what the layer holds.
            seen: what its attention has just done.
            keep: `(rows,)` int64, entries that each head of a row may have.
        """
        scores = self.protected(self.scores(entries, seen), entries, keep)
        if self.storage == "dense":
            return Selection(best(scores, keep[:, None].expand(-1, scores.shape[1]), entries))
        return Selection(best(scores, self.head_budgets(scores, keep), entries))

    def protected(self, scores: Tensor, entries: Entries, keep: Tensor) -> Tensor:
        """Return scores with `-inf` for what stands for nothing, `inf` for the last tokens and the sinks."""
        scores = scores.float()
        # Finite scores stay apart from what is certain, whatever a method returns.
        most = torch.finfo(scores.dtype).max
        scores = torch.nan_to_num(scores, nan=0.0, posinf=most, neginf=-most)
        sinks = keep.clamp(max=self.sinks)  # where there is no room for both, sinks come first
        window = torch.minimum(keep - sinks, self.last(keep))
        first = (entries.columns - entries.padding[:, None, None]) < sinks[:, None, None]
        last = entries.age < window[:, None, None]
        scores = scores.masked_fill(first | last, torch.inf)
        return scores.masked_fill(~entries.real, -torch.inf)

    def slack(self, keep: int) -> int:
        """Return how many tokens too many are tolerated while decoding, before some are dropped; no fewer for more."""
        return (max(1, keep // 64) if self.interval is None else self.interval) - 1

    def options(self) -> dict[str, Any]:
        """Return the policy's options as they would be given to it again."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}


def best(scores: Tensor, counts: Tensor, entries: Entries) -> Tensor:
    """Return the indices of the best entries of every head, ascending, -1 in front where there are fewer.

    Args:
        scores: `(rows, key heads, n)`, `-inf` for what must not stay.
        counts: `(rows, key heads)` how many each head keeps.
        entries: what the scores are of.

    Example:
        >>> keys = torch.zeros(1, 1, 4, 1)
        >>> entries = Entries(keys, keys, torch.arange(4).view(1, 1, 4), 4, torch.zeros(1))
        >>> best(torch.tensor([[[3.0, -torch.inf, 2.0, 5.0]]]), torch.tensor([[2]]), entries)
        tensor([[[0, 3]]])
    """
    counts = counts.minimum(entries.real.sum(-1))
    most = int(counts.max()) if counts.numel() else 0
    index = scores.topk(most, dim=-1).indices
    if bool((counts < most).any()):
        rank = torch.arange(most, device=index.device)
        index = index.masked_fill(rank >= counts[..., None], NOTHING)
    return index.sort(dim=-1).values

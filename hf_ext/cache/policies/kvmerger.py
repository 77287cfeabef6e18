"""Merge neighbouring tokens whose keys are alike instead of dropping some of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_ext.cache.entries import NOTHING, Entries
from hf_ext.cache.ops import merge_entries
from hf_ext.cache.policy import CachePolicy, Seen, best

#: Put below the similarity of pairs that are merged only when nothing else is left: cosines differ by 2 at most.
_HEAVY, _CERTAIN = 4.0, 8.0


@dataclass(kw_only=True)
class KVMerger(CachePolicy):
    """Merge neighbours with similar keys into one entry each, the weighted mean of their keys and of their values.

    In each head the tokens are gone through from the last to the first, and each joins the set of the token after
    it if the cosine of their keys reaches a threshold. The most attended tokens, the first and the last ones stay as
    they are. The member `p` of a set that got the most attention is its pivot; with
    `g_i = exp(-|k_p - k_i|^2 / (2 s^2))` the set becomes the means of its keys and values weighted by `g_i`.

    What the paper leaves open or what is otherwise here:

    - the threshold is found from the budget unless it is given. A set being a run of neighbours, the threshold at which
      a head has `keep` sets is that of its most similar pairs, as many as there are entries too many: no search;
    - under a small budget that finds keys which have little to do with each other. Pairs whose cosine is below `least`
      are not merged: what is too much then is dropped, the least attended first, as by H2O. `least=-1.0` merges all;
    - `s` is defined there by the weights that it defines. Here it is the mean distance of the other members to the
      pivot, times `bandwidth`, which does not depend on the scale of the keys;
    - an entry of several tokens has less attention than they had: a softmax counts it once. So it carries the logarithm
      of how many they are as a bias to its scores, and counts as many in later merges. Merging equal keys then changes
      nothing, whatever their values. `biased=False` is the method without that;
    - keys are merged as they are cached, after the rotation by their positions.

    Source: Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks (arXiv:2407.08454).

    Args:
        budget: what each head may keep; see `CachePolicy`, as for all other options.
        threshold: cosine from which neighbours are merged, all of them whenever there are more entries than the budget
            says, and no others, so that the budget may be exceeded; by default just so many pairs as the budget wants.
        least: without a threshold, the cosine from which neighbours may be merged at all; with -1.0 nothing is
            dropped, and the first, the last and heavy tokens are merged if nothing else is left.
        heavy: share of the budget for the most attended tokens, which are not merged.
        recent: share of the budget for the last tokens, which are not merged; `window` of them at least.
        sinks: first tokens that are not merged.
        bandwidth: of the Gaussian kernel, in mean distances to the pivot.
        biased: whether merged entries count as many as they stand for.

    Raises:
        ValueError: shares that leave nothing to merge, a `least` below -1.0, or a bandwidth that is not positive.

    Example:
        >>> from hf_ext.cache import CompressedCache
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.build("llama")
        >>> model.set_attn_implementation("hf_ext")
        >>> cache = CompressedCache(model.config, KVMerger(budget=6, sinks=1, least=-1.0))
        >>> _ = model(torch.arange(3, 15)[None], past_key_values=cache)
        >>> cache.held(), cache.entries(0).fields["bias"].exp().sum(-1).round().tolist()
        ([6, 6], [[12.0, 12.0]])
    """

    threshold: float | None = None
    least: float = 0.8
    heavy: float = 0.25
    recent: float = 0.5
    sinks: int = 4
    bandwidth: float = 0.5
    biased: bool = True  # type: ignore[misc]

    column_sums: ClassVar[bool] = True
    adds: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heavy", "recent"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be a share from 0.0 and below 1.0, got {getattr(self, name)!r}")
        if self.heavy + self.recent >= 1:
            raise ValueError(
                f"heavy and recent leave nothing to merge: {self.heavy} and {self.recent} must be below 1.0 together"
            )
        if not self.least >= -1:
            raise ValueError(f"least must be a cosine from -1.0, got {self.least!r}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be above 0, got {self.bandwidth!r}")

    @property
    def storage(self) -> Literal["dense", "ragged"]:  # type: ignore[override]
        """With a threshold every head has its own number of sets."""
        return "dense" if self.threshold is None else "ragged"

    def field_names(self) -> tuple[str, ...]:
        """Return the names of the fields: the attention an entry has got, and its bias."""
        return ("attention", "bias") if self.biased else ("attention",)

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Return the attention that every entry has got."""
        return entries.fields["attention"]

    def last(self, keep: Tensor) -> Tensor:
        """Return how many of the last tokens are not merged."""
        return (keep * self.recent).long().clamp(min=self.window)

    def compress(self, entries: Entries, seen: Seen, keep: Tensor) -> Entries:
        """Return the entries with neighbours merged; see `CachePolicy.compress`."""
        similarity = self.similarities(entries, seen, keep)
        if self.threshold is not None:
            joined = similarity >= self.threshold
        else:
            surplus = (entries.real.sum(-1) - keep[:, None]).clamp(min=0)
            possible = similarity if self.least <= -1 else similarity.masked_fill(similarity < self.least, -torch.inf)
            joined = most(possible, surplus)
        merged = self.merged(entries, joined)
        if self.threshold is not None or self.least <= -1:
            return merged
        counts = keep[:, None].expand(-1, merged.keys.shape[1])
        return merged.take(best(self.protected(self.scores(merged, seen), merged, keep), counts, merged))

    def similarities(self, entries: Entries, seen: Seen, keep: Tensor) -> Tensor:
        """Return how willingly each entry is merged with the next, `(rows, key heads, n - 1)`.

        That is the cosine of their keys. If one of the two is heavy it is less than -1, and if it is one of the
        first or last still less: these are merged only where a budget leaves nothing else. `-inf` for no entries.
        """
        scores = self.protected(self.scores(entries, seen), entries, keep)
        certain = scores == torch.inf
        heavy = best(scores, certain.sum(-1) + (keep * self.heavy).long()[:, None], entries)
        marked = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool, device=scores.device)
        marked.scatter_(2, heavy % marked.shape[2], True)  # what stands for nothing marks the last place
        less = _HEAVY * marked[..., :-1] + (_CERTAIN - _HEAVY) * certain
        keys = torch.nn.functional.normalize(entries.keys.float(), dim=-1)
        cosine = (keys[:, :, :-1] * keys[:, :, 1:]).sum(-1)
        both = entries.real[..., :-1]  # what stands for nothing stands in front
        return (cosine - torch.maximum(less[..., :-1], less[..., 1:])).masked_fill(~both, -torch.inf)

    def merged(self, entries: Entries, joined: Tensor) -> Entries:
        """Return what the entries become.

        Args:
            entries: what the layer holds.
            joined: `(rows, key heads, n - 1)` bool, whether each entry is merged with the next.
        """
        sets, count = numbered(entries.real, joined)
        attention, bias = entries.fields["attention"], entries.fields.get("bias")
        pivots = pivots_of(attention, sets, count)
        weights = gaussian(entries.keys, sets, pivots, self.bandwidth)
        masses = None if bias is None else bias.exp()
        keys, values, mass = merge_entries(
            entries.keys, entries.values, weights if masses is None else weights * masses, sets, count, masses=masses
        )
        columns = entries.columns.gather(2, pivots.clamp(min=0)).masked_fill(pivots < 0, NOTHING)
        fields = {"attention": _added(attention, sets, count)}
        if bias is not None:
            fields["bias"] = mass.log().masked_fill(pivots < 0, 0.0)
        return dataclasses.replace(entries, keys=keys, values=values, columns=columns, fields=fields)


def most(numbers: Tensor, counts: Tensor) -> Tensor:
    """Mark the largest numbers of each head.

    Args:
        numbers: `(rows, heads, n)`.
        counts: `(rows, heads)` how many to mark; `-inf` is never marked.

    Example:
        >>> most(torch.tensor([[[0.1, 0.3, 0.2]]]), torch.tensor([[2]]))
        tensor([[[False,  True,  True]]])
    """
    largest = int(counts.max()) if counts.numel() else 0
    found = numbers.topk(min(largest, numbers.shape[-1]), dim=-1)
    wanted = torch.arange(found.indices.shape[-1], device=numbers.device) < counts[..., None]
    wanted &= found.values > -torch.inf
    return torch.zeros_like(numbers, dtype=torch.bool).scatter_(2, found.indices, wanted)


def numbered(real: Tensor, joined: Tensor) -> tuple[Tensor, int]:
    """Number the sets of every head so that all heads end with the same number.

    Args:
        real: `(rows, heads, n)` bool, False for what belongs to no set.
        joined: `(rows, heads, n - 1)` bool, whether each entry belongs to the set of the next.

    Returns:
        `(rows, heads, n)` int64 numbers, -1 for none, and how many there are; a head with fewer sets lacks the first.

    Example:
        >>> numbered(torch.tensor([[[False, True, True, True]]]), torch.tensor([[[False, True, False]]]))
        (tensor([[[-1,  0,  0,  1]]]), 2)
    """
    first = real.clone()
    first[..., 1:] &= ~joined
    numbers = first.long().cumsum(-1)
    counts = numbers[..., -1:]
    count = int(counts.max()) if counts.numel() else 0
    return (numbers - 1 + count - counts).masked_fill(~real, -1), count


def pivots_of(attention: Tensor, sets: Tensor, count: int) -> Tensor:
    """Return the most attended member of every set, the first of several, `(rows, heads, count)`; -1 for none.

    Example:
        >>> pivots_of(torch.tensor([[[0.0, 2.0, 3.0, 1.0]]]), torch.tensor([[[-1, 1, 1, 2]]]), 3)
        tensor([[[-1,  2,  3]]])
    """
    where = _slots(sets, count)
    shape = (*sets.shape[:2], count + 1)
    highest = attention.new_full(shape, -torch.inf).scatter_reduce(2, where, attention, "amax")
    n = sets.shape[-1]
    places = torch.arange(n, device=sets.device).expand_as(sets)
    places = places.masked_fill(attention < highest.gather(2, where), n)
    first = sets.new_full(shape, n).scatter_reduce(2, where, places, "amin")[..., :count]
    return first.masked_fill(first == n, -1)


def gaussian(keys: Tensor, sets: Tensor, pivots: Tensor, bandwidth: float = 1.0) -> Tensor:
    """Return the weight of every member of every set, `(rows, heads, n)` float32: 1 for pivots.

    Args:
        keys: `(rows, heads, n, width)`.
        sets: `(rows, heads, n)` numbers of sets, -1 for none.
        pivots: `(rows, heads, count)` members of sets, -1 for none.
        bandwidth: of the kernel, in mean distances of a set's other members to the pivot.

    Example:
        >>> keys = torch.tensor([0.0, 1.0, 3.0]).view(1, 1, 3, 1)
        >>> gaussian(keys, torch.zeros(1, 1, 3, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int64))
        tensor([[[1.0000, 0.8825, 0.3247]]])
    """
    count = pivots.shape[-1]
    own = pivots.clamp(min=0).gather(2, sets.clamp(min=0))
    centre = keys.gather(2, own[..., None].expand_as(keys))
    distances = (keys.float() - centre.float()).norm(dim=-1).masked_fill(sets < 0, 0.0)
    others = (_added(torch.ones_like(distances), sets, count) - 1).clamp(min=1)
    sigma = bandwidth * (_added(distances, sets, count) / others).gather(2, sets.clamp(min=0))
    # What rounding alone sets apart is equal and weighs the same; no weight is 0, as the mean divides by their sum.
    rounding = torch.finfo(keys.dtype).eps ** 0.5 * centre.float().norm(dim=-1)
    exponent = -0.5 * (distances / sigma.maximum(rounding)).square()
    return exponent.nan_to_num(nan=0.0).exp().clamp(min=torch.finfo(torch.float32).tiny)


def _slots(sets: Tensor, count: int) -> Tensor:
    """Return where the members of each set are gathered: what belongs to none in a last place."""
    return sets.masked_fill(sets < 0, count)


def _added(numbers: Tensor, sets: Tensor, count: int) -> Tensor:
    """Return the sums of the sets, `(rows, heads, count)`."""
    total = numbers.new_zeros(*sets.shape[:2], count + 1)
    return total.scatter_add_(2, _slots(sets, count), numbers)[..., :count]

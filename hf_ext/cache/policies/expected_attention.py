"""Keep what queries to come are expected to attend to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ext.cache.entries import Entries
from hf_ext.cache.policies.rotations import mean_turn, rotations_of, turn
from hf_ext.cache.policy import CachePolicy, Seen, When


@dataclass(kw_only=True)
class ExpectedAttention(CachePolicy):
    """Keep what queries to come are expected to attend to, if they are distributed as those so far.

    Queries without their positions are taken for normal with mean `m` and covariance `C`; at the next `horizon`
    positions they are turned by the mean rotation `R`. The expected attention of a key is then
    `softmax(s k·Rm + s² kᵀ R C Rᵀ k / 2)` with the scale `s` of attention, and its score that times the norm of the
    value. By default only the prompt is compressed, from the queries of the whole pass. Where decoded tokens are, the
    last `samples` queries are held, too, and count as memory.

    Source: Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution
    (arXiv:2510.00636). Where a model caps its scores softly, the expectation is that without the cap.

    Args:
        rotations: how the model turns queries by positions, from `rotations_of(model)`; None for a model whose
            positions are learned embeddings. `ExpectedAttention.of(model, ...)` finds out.
        budget: what each head may keep; see `CachePolicy`, as for all other options.
        horizon: so many positions to come are averaged over.
        sinks: first tokens; they stay, and their queries do not count.
        covariance: whether the covariance of queries counts, or their mean alone.
        values: whether scores are multiplied with the norm of the value.
        epsilon: added to the expected attention before that.
        samples: how many of the last queries count, unless `when="prefill"`.

    Raises:
        ValueError: an option that is not of the form above; when it runs, rotations of another model.

    Example:
        >>> from hf_ext.cache import CompressedCache
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.build("llama").eval()
        >>> model.set_attn_implementation("hf_ext")
        >>> cache = CompressedCache(model.config, ExpectedAttention.of(model, budget=8))
        >>> _ = model(torch.arange(1, 21)[None], past_key_values=cache)
        >>> cache.columns(0)[0, 0, :4].tolist(), cache.held()
        ([0, 1, 2, 3], [8, 8])
    """

    rotations: Tensor | None = dataclasses.field(repr=False, compare=False)
    when: When = "prefill"
    sinks: int = 4
    horizon: int = 512
    covariance: bool = True
    values: bool = True
    epsilon: float = 0.0
    samples: int = 256

    @classmethod
    def of(cls, model: Any, **options: Any) -> ExpectedAttention:
        """Return the policy for a model.

        Args:
            model: with rotary positions; it is run on a few tokens to see what they are.
            options: of the policy.

        Raises:
            ValueError: the model's positions are no rotations. If they are learned embeddings that are added to the
                input, `rotations=None` is right for it.
        """
        try:
            rotations = rotations_of(model)
        except ValueError as error:
            raise ValueError(
                f"{error}. If positions are learned embeddings added to the input, give "
                "ExpectedAttention(rotations=None); biases of the scores it does not know"
            ) from error
        return cls(rotations=rotations, **options)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.rotations
        if given is not None and (not isinstance(given, Tensor) or given.ndim != 3 or given.shape[1] != 2):
            raise ValueError(
                f"rotations must come from rotations_of(model), or be None for a model without rotary positions; "
                f"got {given if not isinstance(given, Tensor) else tuple(given.shape)!r}"
            )
        for name in ("horizon", "samples"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a number of tokens from 1, got {value!r}")
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int | float) or self.epsilon < 0:
            raise ValueError(f"epsilon must be a number from 0.0, got {self.epsilon!r}")

    @property
    def queries(self) -> int:  # type: ignore[override]
        """All queries of the prompt, or the last ones."""
        return -1 if self.when == "prefill" else self.samples

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Return the expected attention times the norms of the values."""
        mean, spread = self.statistics(entries, seen)
        keys = entries.keys.float()
        heads = keys.shape[1]
        groups = mean.shape[1] // heads
        mean = mean.unflatten(1, (heads, groups)) * seen.scale
        first = (entries.columns - entries.padding[:, None, None]) < self.sinks
        out = first | ~entries.real
        total = torch.zeros_like(entries.columns, dtype=torch.float32)
        for member in range(groups):  # one at a time: the products take as much memory as the keys
            logits = torch.einsum("bhd,bhnd->bhn", mean[:, :, member], keys)
            if spread is not None:
                own = spread.unflatten(1, (heads, groups))[:, :, member] * (seen.scale**2 / 2)
                logits = logits + ((keys @ own) * keys).sum(-1)
            total += logits.masked_fill(out, torch.finfo(logits.dtype).min).softmax(-1) / groups
        if self.values:
            total = (total + self.epsilon) * entries.values.float().norm(dim=-1)
        return total

    def statistics(self, entries: Entries, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """Return mean `(rows, heads, width)` and covariance `(rows, heads, width, width)` of queries to come."""
        queries, columns, real = seen.queries, seen.query_columns, seen.query_real
        assert queries is not None
        assert columns is not None
        assert real is not None
        places = columns - entries.padding[:, None]  # (rows, queries)
        counted = real & (places >= self.sinks)
        counted = torch.where(counted.any(1, keepdim=True), counted, real)[:, None, :, None]
        count = counted.sum(2, keepdim=True).clamp(min=1)
        turned = queries.float()
        rotation = self._rotation(seen, queries)
        if rotation is not None:  # to the end of the text, from where they are turned on
            turned = turn(rotation, turned, (entries.tokens[:, None] - places)[:, None])
        mean = (turned * counted).sum(2, keepdim=True) / count
        spread = None
        if self.covariance:
            apart = (turned - mean) * counted
            spread = apart.transpose(2, 3) @ apart / count
        mean = mean[:, :, 0]
        if rotation is not None:
            on = mean_turn(rotation, 0, self.horizon).to(mean.dtype)
            mean = mean @ on.T
            spread = None if spread is None else on @ spread @ on.T
        return mean, spread

    def _rotation(self, seen: Seen, queries: Tensor) -> Tensor | None:
        if self.rotations is None:
            return None
        layers, _, width = self.rotations.shape
        own = self.rotations[seen.model_layer, :, : queries.shape[-1]] if seen.model_layer < layers else None
        # Where layers have heads of different widths, the narrower ones are filled up.
        if own is None or own.shape[1] < queries.shape[-1] or own[0].max() >= queries.shape[-1]:
            raise ValueError(
                f"the rotations are of a model of {layers} layers with heads of width {width}; this one has a layer "
                f"{seen.model_layer} with heads of width {queries.shape[-1]}: make the policy with "
                "ExpectedAttention.of(model)"
            )
        return own.to(queries.device)

"""Keep everything, in a few bits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_ext.cache.entries import Entries
from hf_ext.cache.policy import CachePolicy, Seen
from hf_ext.cache.quantisation import Quantisation


@dataclass(kw_only=True)
class KIVI(CachePolicy):
    """Quantise what is older than the last tokens: keys channel by channel, values token by token.

    Nothing is dropped. To drop and quantise, give another policy to `CompressedCache(..., quantise=...)`.

    Source: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv:2402.02750), section 3.

    Args:
        bits: of a code: 2, 4 or 8.
        group: tokens of a group of keys.
        channels: channels of a group of values at most.
        residual: so many last tokens stay in full precision.
        guard: whether to warn where keys do not survive; for all these see `Quantisation`.
        budget: 1.0, as nothing is dropped; the other options of `CachePolicy` mean nothing here.

    Raises:
        ValueError: an option that is not of the form above.

    Example:
        >>> from hf_ext.cache import CompressedCache
        >>> from hf_ext.testing import tiny_models
        >>> model, ids = tiny_models.shared("llama"), tiny_models.prompts((60,))[0]
        >>> cache = CompressedCache(model.config, KIVI(bits=4, group=8, residual=16))
        >>> _ = model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
        >>> cache.held(), [layer.store.frozen for layer in cache.layers]
        ([61, 61], [40, 40])
    """

    budget: int | float = 1.0
    bits: int = 2
    group: int = 32
    channels: int = 32
    residual: int = 128
    guard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.budget, int) or self.budget != 1.0:
            raise ValueError(
                f"KIVI drops nothing, so its budget is 1.0, not {self.budget!r}; to drop as well, give "
                "CompressedCache another policy together with quantise=Quantisation(...)"
            )
        self.quantise()

    def quantise(self) -> Quantisation:
        """Return how older entries are packed."""
        return Quantisation(
            bits=self.bits, group=self.group, channels=self.channels, residual=self.residual, guard=self.guard
        )

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Raise: nothing is dropped."""
        raise ValueError("KIVI drops nothing: leave layer_budgets out, or give another policy with quantise=")

"""Keep what the last queries of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from hf_ext.cache.entries import Entries
from hf_ext.cache.policies.received import received
from hf_ext.cache.policy import CachePolicy, Seen, When


@dataclass(kw_only=True)
class SnapKV(CachePolicy):
    """Keep what the last queries attend to, smoothed over neighbouring tokens, and the window of these queries.

    The score of an entry before the window is the attention it gets from the queries of the window, averaged over them
    and over the heads that share the key, then averaged over `kernel` neighbours. By default only the prompt is
    compressed, as in the paper. With `when="both"` the last `window` queries are held, too, and count as memory.

    Source: SnapKV: LLM Knows What You are Looking for Before Generation (arXiv:2404.14469), section 4.

    Args:
        budget: what each head may keep, the window included; see `CachePolicy`, as for all other options.
        window: last tokens, whose queries vote and which stay.
        kernel: how many neighbours are smoothed over, an odd number; 1 for none.

    Raises:
        ValueError: an option that is not of the form above.

    Example:
        >>> import torch
        >>> from hf_ext.cache import CompressedCache
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.build("llama").eval()
        >>> model.set_attn_implementation("hf_ext")
        >>> cache = CompressedCache(model.config, SnapKV(budget=6, window=2))
        >>> _ = model(torch.arange(1, 21)[None], past_key_values=cache)
        >>> cache.columns(0)[0, 0, -2:].tolist(), cache.held()
        ([18, 19], [6, 6])
    """

    window: int = 32
    when: When = "prefill"
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"{type(self).__name__} needs a window of at least 1 token, whose queries vote; got 0")
        if isinstance(self.kernel, bool) or not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number of tokens, got {self.kernel!r}")

    @property
    def queries(self) -> int:  # type: ignore[override]
        """The queries of the window."""
        return self.window

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        """Return the smoothed attention of the window."""
        votes = received(entries, seen).masked_fill(entries.age < self.window, 0)
        return functional.avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)

"""Kangaroo's adapter on a shallow exit (arXiv:2404.18911).

    exit state h  -->  h + Attention(RMSNorm(h))  -->  RMSNorm  -->  the target's final norm and LM head

One attention and two norms are all that is trained. The released code feeds the second norm's
output to the LM head directly; here the target's own final norm comes between, so that scale,
output projection and soft-capping are right from the start on any architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache

from hf_ext.generation.heads.base import DraftHead, DraftHeadConfig, Terms, distillation, visible
from hf_ext.layers import TargetEnds
from hf_ext.trainer_callbacks.noise import document_positions


class KangarooConfig(DraftHeadConfig):
    """Config of a `KangarooHead`.

    Args:
        exit_layer: how many layers of the target come before the head.
        num_heads: attention heads.
        rope_theta: base of the rotary positions.
        **kwargs: see `DraftHeadConfig`.
    """

    model_type = "kangaroo-head"

    def __init__(self, exit_layer: int = 2, num_heads: int = 4, rope_theta: float = 10000.0, **kwargs: Any) -> None:
        self.exit_layer, self.num_heads, self.rope_theta = exit_layer, num_heads, rope_theta
        super().__init__(**kwargs)


class KangarooHead(DraftHead):
    """Adapter that turns the state after `exit_layer` layers into a draft of the last state.

    Args:
        config: sizes.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> target = build("llama")
        >>> head, ends = KangarooHead.for_target(target, exit_layer=1), TargetEnds(target)
        >>> positions = torch.arange(4)[None]
        >>> head.logits(torch.zeros(1, 4, 32), positions, ends).shape
        torch.Size([1, 4, 96])
    """

    config_class = KangarooConfig

    def __init__(self, config: KangarooConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        if width % (2 * config.num_heads):
            raise ValueError(f"num_heads={config.num_heads} must divide hidden_size={width} into even parts")
        self.norm, self.out_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.post_init()

    @classmethod
    def defaults(cls, known: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Exit after a third of the layers, with as many attention heads as the target has."""
        heads, width = config.num_attention_heads, known["hidden_size"]
        return {
            "exit_layer": max(1, known["num_hidden_layers"] // 3),
            "num_heads": heads if width % (2 * heads) == 0 else 1,
        }

    def forward(
        self, states: Tensor, positions: Tensor, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Run the adapter.

        Args:
            states: (rows, n, hidden), the target's states after `exit_layer` layers.
            positions: (rows, n), position of each in its row's sequence.
            mask: (rows or 1, 1, n, columns) bool, which columns each query sees: those of `cache`
                first, then the n new ones. None: causal within the n, all of the cache.
            cache: a transformers `Cache` with one layer (`DynamicCache()`), which gets the new keys
                and values; None to keep nothing.

        Returns:
            (rows, n, hidden) for `TargetEnds.logits`.
        """
        rows, n, width = states.shape
        split = self.qkv(self.norm(states)).view(rows, n, 3, self.config.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        cos, sin = self._rotation(positions, states)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, 0)
        columns = key.shape[2]
        if mask is None and n > 1:
            mask = torch.ones(n, columns, dtype=torch.bool, device=states.device).tril(columns - n)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_norm(states + self.out(mixed.transpose(1, 2).reshape(rows, n, width)))

    def logits(
        self,
        states: Tensor,
        positions: Tensor,
        ends: TargetEnds,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return draft logits (rows, n, vocabulary); arguments as in `forward`."""
        return ends.logits(self(states, positions, mask, cache))

    def _rotation(self, positions: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        half = self.config.hidden_size // self.config.num_heads // 2
        powers = torch.arange(half, dtype=torch.float32, device=states.device) / half
        angles = positions[:, None, :, None].float() * self.config.rope_theta**-powers
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)

    # -- training ----------------------------------------------------------------------------------

    @property
    def trained_on(self) -> tuple[int, ...]:
        """The exit state."""
        return (self.config.exit_layer,)

    def training_terms(
        self,
        ends: TargetEnds,
        batch: Mapping[str, Any],
        targets: Tensor,
        states: Mapping[int, Tensor],
        outputs: Any,
        uniform: Callable[..., Tensor],
    ) -> Terms:
        """Cross-entropy of the draft against the target's distribution at every position that trains."""
        keep = targets != -100
        positions = document_positions(batch).clamp(min=0)
        drafted = self(states[self.config.exit_layer], positions, visible(batch)[:, None])[keep]
        loss, hits = distillation(ends.logits(drafted), outputs.logits[keep])
        count = keep.sum()
        return {"loss": (loss, count), "agreement": (hits, count)}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

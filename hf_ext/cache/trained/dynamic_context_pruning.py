"""The cache of a model that was trained to drop tokens for good (arXiv:2305.15805)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_ext.cache.entries import Entries
from hf_ext.cache.policy import CachePolicy, Seen, Selection, best
from hf_ext.cache.trained.interaction import Interaction

#: What a running forward pass leaves for the cache: the layer's trained part, its small queries and its small keys.
Arriving = tuple[Interaction, Tensor, Tensor]
ARRIVING: weakref.WeakKeyDictionary[nn.Module, Arriving] = weakref.WeakKeyDictionary()
#: The column at which an entry is dropped that nobody has dropped.
NEVER = torch.iinfo(torch.int32).max
INTERACTION, END = "interaction", "end"


@dataclass(kw_only=True)
class DynamicContextPruning(CachePolicy):
    """Drop what the model was trained to drop: every new token says which ones before it nobody needs any more.

    For a `DynamicContextPruningModel`, whose `generate` uses it by itself. There is no budget, the model decides:
    layers and rows hold different numbers of tokens, all heads of a layer hold the same ones. Beside keys and values,
    an entry has a small key of the interaction, divided among the heads.

    Source: Dynamic Context Pruning for Efficient and Interpretable Autoregressive Transformers (arXiv:2305.15805).

    Args:
        budget: 1.0, as the model decides.
        sinks: 0, likewise.
        window: 0, likewise.
        when: dropped tokens leave the memory at prefill, while decoding, or both; nobody sees them in any case.
        interval: dropped tokens leave the memory as soon as there are so many of them in a row; by default a 64th of
            what is held. Nobody sees them before that, either.

    Raises:
        ValueError: a budget, sinks or a window; when the model runs, one that is no `DynamicContextPruningModel`.

    Example:
        >>> import torch
        >>> from peft import LoraConfig
        >>> from hf_ext.cache import CompressedCache, DynamicContextPruningModel
        >>> from hf_ext.testing import tiny_models
        >>> base = tiny_models.build("llama")
        >>> base.set_attn_implementation("hf_ext")
        >>> lora = LoraConfig(r=2, target_modules=["q_proj"])
        >>> model = DynamicContextPruningModel(base, lora, rank=8, beta=0.5).eval()
        >>> cache = CompressedCache(base.config, DynamicContextPruning())
        >>> out = model.generate(torch.arange(1, 13)[None], past_key_values=cache, max_new_tokens=4, do_sample=False)
        >>> cache.get_seq_length() > max(cache.held())
        True
    """

    gated: ClassVar[bool] = True
    only_for: ClassVar[str] = "DynamicContextPruningModel"
    budget: int | float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != 1.0 or self.sinks or self.window:
            raise ValueError(
                f"{type(self).__name__} takes no budget, sinks or window: the model was trained to decide what stays. "
                "Train with a larger gamma for it to drop more"
            )

    def field_names(self) -> tuple[str, ...]:
        """Return the names of the fields: the small keys, and the columns of the tokens that dropped the entries."""
        return (INTERACTION, END)

    def arriving(self, keys: Tensor, module: nn.Module) -> Mapping[str, Tensor]:
        """Return the small keys of new tokens, a part of each in every head, since all heads hold the same tokens."""
        rows, heads, count, _ = keys.shape
        small = _of(module)[2].detach()
        width = -(-small.shape[-1] // heads)
        small = nn.functional.pad(small, (0, width * heads - small.shape[-1]))
        return {
            INTERACTION: small.unflatten(-1, (heads, width)).transpose(1, 2),
            END: torch.full((rows, heads, count), NEVER, dtype=torch.int32, device=keys.device),
        }

    def gate(self, entries: Entries, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Let the new tokens drop entries, and hide these from them and from those that come later."""
        assert seen.module is not None
        assert seen.query_columns is not None
        interaction, query, _ = _of(seen.module)
        keys = entries.fields[INTERACTION].transpose(1, 2).flatten(2)[..., : interaction.rank]
        own = seen.query_columns.to(torch.int32)[:, None]
        drops = interaction.logits(query.detach(), keys).detach() <= 0
        drops &= entries.columns[:, :1] < own
        if seen.query_real is not None:
            drops &= seen.query_real[:, :, None]
        end = entries.fields[END][:, 0]
        # Tokens that were forgotten since (`crop`) have dropped nothing.
        end = torch.where(end < own[0], end, NEVER)
        end = torch.minimum(end, torch.where(drops, own, NEVER).amin(1))
        visible = own < end[:, None]
        return visible[:, None], {END: end[:, None].expand_as(entries.columns)}

    def compress(self, entries: Entries, seen: Seen, keep: Tensor) -> Selection | None:
        """Return the entries that nobody has dropped, and that a sliding layer still reaches."""
        alive = entries.real & (entries.fields[END] >= entries.seen)
        if seen.window is not None:
            alive &= entries.age < seen.window
        wanted = max(1, len(entries) // 64) if self.interval is None else self.interval
        if int((entries.real & ~alive)[:, 0].sum(-1).max()) < wanted:
            return None
        return Selection(best(torch.where(alive, 0.0, -torch.inf), alive.sum(-1), entries))


def _of(module: nn.Module) -> Arriving:
    found = ARRIVING.get(module)
    if found is None:
        raise ValueError(
            "DynamicContextPruning drops what the trained parts of a DynamicContextPruningModel say; run that model "
            "(not its base model) with this cache, or choose another policy"
        )
    return found

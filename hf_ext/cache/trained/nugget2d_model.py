"""A stock model that reads its history through nuggets (arXiv:2310.02409)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_ext.attention.intercept import Attended, intercept, visible
from hf_ext.cache.cache import CompressedCache
from hf_ext.cache.layer import CompressedLayer
from hf_ext.cache.trained.add_on import AddOnModel, attention_modules
from hf_ext.cache.trained.nugget2d import Nugget2D
from hf_ext.layers import captured

#: What stock `generate` does not do right after a cache that holds tokens, its own included: assisted decoding in all
#: releases that are supported, prompts in chunks in the older ones.
AFTER_NO_CACHE = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


class Scorer(nn.Module):
    """Say how much each state is worth, by two linear layers.

    Args:
        width: of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # In float32 also where the model is not: small steps would be lost to rounding.
        self.inner = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.outer = nn.Parameter(torch.randn(width) / math.sqrt(width))

    def forward(self, states: Tensor) -> Tensor:
        """Return `(rows, tokens)` float32 of `(rows, tokens, width)`."""
        with torch.autocast(states.device.type, enabled=False):
            inner = nn.functional.linear(states.float(), self.inner.float(), self.shift.float())
            return nn.functional.relu(inner) @ self.outer.float()


class Nugget2DModel(AddOnModel):
    """A causal model, an adapter, and a scorer: contexts are read once, and kept as keys and values of a few tokens.

    The scorer values every token of a context by its state after some layers; the best ones, and the last token, are
    its nuggets. What comes after a context sees its nuggets alone, at the positions that they had. Since choosing has
    no gradient, the scorer learns through attention: a nugget's score is added to the attention that it gets, and
    taken off again without gradient, so that the values stay what they are.

    Train it with the stock Trainer and a `NuggetCollator`: a batch has `context_ids` and `context_mask` (padded on the
    left), what is compressed, and `input_ids`, `attention_mask` and `labels`, what is read after it. The label of the
    first token of `input_ids` is not used. Loss and gradients do not depend on padding, nor on how a batch is split by
    accumulation. The same adapter reads contexts and what follows.

    `save_pretrained` and every checkpoint hold a stock PEFT adapter and `nugget2d.safetensors`.

    Source: Nugget 2D: Dynamic Contextual Compression for Scaling Decoder-only Language Models (arXiv:2310.02409).

    Args:
        model: a causal language model; it is changed in place, as by `get_peft_model`.
        peft_config: of the adapter: any method that changes layers (LoRA, DoRA, IA3, ...).
        budget: nuggets of a context: a number when an int, a share of its tokens when a float.
        layer: the scorer reads the states after so many layers; 3, or as many as there are below the last one.
        adapter_name: of the adapter.

    Raises:
        ValueError: an encoder-decoder, layers with a sliding window, prompt tuning, or a budget or layer that is none.

    Example:
        >>> from peft import LoraConfig
        >>> from hf_ext.testing import tiny_models
        >>> base = tiny_models.build("llama")
        >>> base.set_attn_implementation("hf_ext")
        >>> model = Nugget2DModel(base, LoraConfig(r=2, target_modules=["q_proj"]), budget=0.25).eval()
        >>> ids, mask = tiny_models.prompts((12, 8))
        >>> cache = model.compress(ids, mask)
        >>> cache.get_seq_length(), cache.held()
        (12, [3, 3])
        >>> out = model.generate(context_ids=ids, context_mask=mask, input_ids=ids[:, -2:], max_new_tokens=3)
    """

    FILE: ClassVar[str] = "nugget2d.safetensors"
    NAME: ClassVar[str] = "nugget2d"

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: PeftConfig,
        *,
        budget: int | float = 0.1,
        layer: int | None = None,
        adapter_name: str = "default",
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        layers = config.num_hidden_layers
        layer = min(3, layers - 1) if layer is None else layer
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers:
            raise ValueError(f"layer must be a number of layers from 0 to {layers - 1}, got {layer!r}")
        attention_modules(model, type(self).__name__)
        held = CompressedCache(model.config, Nugget2D(budget=budget)).layers
        if not all(isinstance(layer, CompressedLayer) and layer.window is None for layer in held):
            raise ValueError("Nugget2DModel needs a model whose layers all see everything that came before; some slide")
        super().__init__(model, peft_config, Scorer(config.hidden_size), adapter_name)
        self.layer = layer
        #: How many nuggets a context has; another number may be set.
        self.budget = budget

    def own_options(self) -> dict[str, Any]:
        """Return the budget and the layer."""
        return {"budget": self.budget, "layer": self.layer}

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read contexts, and tokens after them that see their nuggets alone; without contexts, run the model as it is.

        Args:
            input_ids: `(rows, columns)` int64, what follows the contexts, padded on either side.
            attention_mask: of the same shape, 0 on padding.
            labels: of the same shape, -100 where nothing is asked.
            context_ids: `(rows, columns)` int64, padded on the left.
            context_mask: of the same shape, 0 on padding.
            num_items_in_batch: what the summed loss is divided by, as the Trainer passes it.
            **kwargs: forward arguments of the model, without contexts only; `past_key_values` may be what `compress`
                returned.

        Returns:
            Loss and logits, column by column of `input_ids`.

        Raises:
            ValueError: shapes that do not fit, a context without tokens or padded on the right, arguments that cannot
                be honoured, or gradient checkpointing.
        """
        if context_ids is None:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        given = [name for name, value in kwargs.items() if value is not None and value is not False]
        if given := [name for name in given if name not in ("return_dict", "use_cache")]:
            raise ValueError(
                f"with a context, Nugget2DModel runs two passes of its own and takes no {', '.join(given)}"
            )
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError(
                "Nugget2DModel trains through the cache, which gradient checkpointing drops; switch it off"
            )
        base: Any = self.get_base_model()
        before = _mask(context_ids, context_mask, "context_ids", left=True)
        if input_ids is None or len(input_ids) != len(context_ids):
            raise ValueError(f"each of the {len(context_ids)} contexts needs a row of input_ids after it")
        after = _mask(input_ids, attention_mask, "input_ids")
        order = after.long().cumsum(1) - 1
        cache = DynamicCache(config=base.config)
        scores = self._read(context_ids, before, cache)
        chosen = Nugget2D(budget=self.budget).chosen(scores, before)
        with intercept(base, _nuggets_alone(scores, chosen)):
            logits = base(
                input_ids, attention_mask=torch.cat([before, after], dim=1).long(), past_key_values=cache,
                position_ids=before.sum(1, keepdim=True) + order.clamp(min=0), use_cache=True,
            ).logits  # fmt: skip
        loss = None
        if labels is not None:
            targets = labels.masked_fill(~after | (order == 0), -100)  # nothing stands before a first token
            vocabulary = base.config.get_text_config(decoder=True).vocab_size
            loss = base.loss_function(
                logits=logits, labels=targets, vocab_size=vocabulary, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @torch.no_grad()
    def compress(
        self, context_ids: Tensor, context_mask: Tensor | None = None, cache: CompressedCache | None = None
    ) -> CompressedCache:
        """Read contexts and keep their nuggets.

        Args:
            context_ids: `(rows, columns)` int64, padded on the left.
            context_mask: of the same shape, 0 on padding.
            cache: what was read before, and stays as it is; an empty one by default.

        Returns:
            The cache, from which the model goes on: as `past_key_values` of `model(...)`, or of `generate` together
            with the ids and the mask of all that was read, contexts included.

        Raises:
            ValueError: a cache or an attention that cannot do it, a context without tokens or padded on the right.
        """
        base: Any = self.get_base_model()
        real = _mask(context_ids, context_mask, "context_ids", left=True)
        if cache is None:
            cache = CompressedCache(base.config, Nugget2D(budget=self.budget))
        if not isinstance(cache, CompressedCache) or not isinstance(cache.policy, Nugget2D):
            raise ValueError(f"nuggets are kept in a CompressedCache(model.config, Nugget2D(...)), got {cache!r}")
        if not cache.by_backend():
            raise ValueError(
                "the rows of a batch have different numbers of nuggets; load the model with "
                "attn_implementation='hf_ext', or call model.set_attn_implementation('hf_ext')"
            )
        chosen = cache.policy.chosen(self._read(context_ids, real, cache), real)
        for layer in cache.layers:
            entries = layer.entries()
            layer.store.keep(cache.policy.select(entries, chosen), entries)
        return cache

    def _read(self, ids: Tensor, real: Tensor, cache: Any) -> Tensor:
        """Read contexts into a cache, and return the scores of their tokens."""
        base: Any = self.get_base_model()
        seen = cache.get_seq_length()
        tokens = cache.layers[0].tokens if seen else [0] * len(ids)
        start = torch.tensor(tokens, device=ids.device)[:, None]
        with captured(base, [self.layer]) as states:
            base(
                ids, attention_mask=torch.cat([real.new_ones(len(ids), seen), real], dim=1).long(), use_cache=True,
                position_ids=start + (real.long().cumsum(1) - 1).clamp(min=0), past_key_values=cache, logits_to_keep=1,
            )  # fmt: skip
        # The scorer learns to read the states, they do not learn to please it.
        return self.parts(states[self.layer].detach())

    def generate(  # type: ignore[override]
        self,
        *args: Any,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate after contexts of which nuggets are kept; without contexts, as the model does.

        Args:
            *args: for the model's own `generate`, without contexts.
            context_ids: `(rows, columns)` int64, padded on the left.
            context_mask: of the same shape, 0 on padding.
            **kwargs: what `generate` takes; with contexts, the prompt is given as `input_ids`.

        Returns:
            As `generate`: rows of prompt and new tokens, without the contexts.

        Raises:
            ValueError: as `compress`; no prompt, or a cache beside contexts.
        """
        if context_ids is None:
            return super().generate(*args, **kwargs)
        prompt = kwargs.pop("input_ids", None)
        if args or prompt is None or kwargs.get("past_key_values") is not None:
            raise ValueError("after contexts, the prompt is given as input_ids=..., and there is no other cache")
        wrong = [name for name in AFTER_NO_CACHE if kwargs.get(name) is not None]
        if wrong:
            raise ValueError(f"{wrong[0]} goes wrong in transformers after any cache that holds tokens; leave it out")
        after = _mask(prompt, kwargs.pop("attention_mask", None), "input_ids", left=True)
        before = _mask(context_ids, context_mask, "context_ids", left=True)
        cache = self.compress(context_ids, before)
        config = kwargs.get("generation_config") or self.get_base_model().generation_config
        copies = [kwargs.get(name, getattr(config, name)) or 1 for name in ("num_beams", "num_return_sequences")]
        if max(copies) > 1:
            cache.batch_repeat_interleave(max(copies))
        found = super().generate(
            input_ids=torch.cat([context_ids, prompt], dim=1), past_key_values=cache,
            attention_mask=torch.cat([before, after], dim=1).long(), **kwargs,
        )  # fmt: skip
        width = context_ids.shape[1]
        if isinstance(found, Tensor):
            return found[:, width:]
        found.sequences = found.sequences[:, width:]
        return found


def _nuggets_alone(scores: Tensor, chosen: Tensor) -> Any:
    """Return an attention that sees the nuggets of contexts alone, and from which their scores learn."""
    width = chosen.shape[1]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any) -> Attended:
        extra = key.shape[2] - width
        seen = visible(mask, query, key) & nn.functional.pad(chosen, (0, extra), value=True)[:, None, None]
        added = nn.functional.pad(scores - scores.detach(), (0, extra))[:, None, None].to(query.dtype)
        added = added.expand(seen.shape).masked_fill(~seen, torch.finfo(query.dtype).min)
        return plain(module, query, key, value, added, **call)

    return attend


def _mask(ids: Tensor, mask: Tensor | None, name: str, left: bool = False) -> Tensor:
    """Return a mask of real tokens, bool."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if real.shape != ids.shape:
        raise ValueError(f"the mask of {name} has the shape {tuple(real.shape)}, expected {tuple(ids.shape)}")
    if left and not bool(real[:, -1].all() & (real[:, 1:] >= real[:, :-1]).all()):
        raise ValueError(f"{name} must be padded on the left, and every row needs a token")
    return real

"""A stock model with small trained parts that drop tokens for good (arXiv:2305.15805)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ext import adapter
from hf_ext.attention.backend import CACHE_LAYER
from hf_ext.attention.intercept import Attended, intercept, visible
from hf_ext.cache.attending import hide
from hf_ext.cache.cache import CompressedCache
from hf_ext.cache.layer import CompressedLayer
from hf_ext.cache.trained.add_on import AddOnModel, attention_modules, before
from hf_ext.cache.trained.dynamic_context_pruning import ARRIVING, DynamicContextPruning
from hf_ext.cache.trained.interaction import Interaction, kept_share, log_survival, survives


class DynamicContextPruningModel(AddOnModel):
    """A causal model, an adapter, and in each layer a small interaction by which tokens drop earlier ones for good.

    In training mode a token that is being dropped fades: attention gets the logarithm of its survival added, which the
    sparse sigmoid with the present `alpha` gives. Train it with the stock Trainer and the callback
    `DynamicContextPruningTraining`, which raises `alpha` and adds the price of what is kept. In evaluation mode what is
    dropped is gone: a pass without cache hides it, and `generate` frees it
    (`CompressedCache(config, DynamicContextPruning())`, under `attn_implementation="hf_ext"`), with the same results.

    The base model stays frozen; the adapter lets it adapt to what is left. `save_pretrained` and every checkpoint hold
    a stock PEFT adapter and `dynamic_context_pruning.safetensors`. Layers with a sliding window drop nothing, unless
    all layers of the model slide.

    Source: Dynamic Context Pruning for Efficient and Interpretable Autoregressive Transformers (arXiv:2305.15805),
    section 3. There, all weights of the model are trained.

    Args:
        model: a causal language model; it is changed in place, as by `get_peft_model`.
        peft_config: of the adapter: any method that changes layers (LoRA, DoRA, IA3, ...).
        rank: width of the small queries and keys.
        beta: what the interactions begin near; the larger, the less is dropped at first.
        adapter_name: of the adapter.

    Raises:
        ValueError: an encoder-decoder, a model whose cache cannot be compressed or whose attention cannot be reached,
            prompt tuning, or a rank that is no positive int.

    Example:
        >>> import torch
        >>> from peft import LoraConfig
        >>> from hf_ext.testing import tiny_models
        >>> lora = LoraConfig(r=2, target_modules=["q_proj"])
        >>> model = DynamicContextPruningModel(tiny_models.build("llama"), lora, rank=8)
        >>> ids = torch.arange(1, 13)[None]
        >>> model(input_ids=ids, labels=ids).loss.backward()
        >>> all(p.grad is not None for p in model.parts.parameters()), model.kept.shape
        (True, torch.Size([2, 1]))
    """

    FILE: ClassVar[str] = "dynamic_context_pruning.safetensors"
    NAME: ClassVar[str] = "dynamic_context_pruning"

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: PeftConfig,
        *,
        rank: int = 64,
        beta: float = 5.0,
        adapter_name: str = "default",
    ) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a positive int, got {rank!r}")
        modules = attention_modules(model, type(self).__name__)
        layers = CompressedCache(model.config, DynamicContextPruning()).layers
        config = model.config.get_text_config(decoder=True)
        pruned = [n for n in modules if isinstance(layers[n], CompressedLayer)]
        names = {module: name for name, module in model.named_modules()}
        paths = [names[modules[n]] for n in pruned]
        parts = nn.ModuleDict({str(n): Interaction(config.hidden_size, rank, beta) for n in pruned})
        super().__init__(model, peft_config, parts, adapter_name)
        #: Of the sparse sigmoid in training mode; the callback raises it.
        self.alpha = 1.0
        self._kept: dict[int, Tensor] = {}
        self._pruned, self._paths = pruned, paths
        self._off = self._running = False

    @property
    def kept(self) -> Tensor | None:
        """`(layers, rows)`, the share of what came before that the tokens of the last pass kept, on average.

        With its gradient in training mode; None where it had a cache, which says itself what it holds.
        """
        shares = [self._kept[n] for n in self._pruned if n in self._kept]
        return torch.stack(shares) if len(shares) == len(self._pruned) else None

    def own_options(self) -> dict[str, Any]:
        """Return the rank."""
        return {"rank": self.parts[str(self._pruned[0])].rank}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; in training mode what is dropped fades, in evaluation mode it is gone.

        Takes and returns what the base model does.

        Raises:
            ValueError: a cache that does not know what was dropped, or training with a compressed one.
        """
        with self.pruning():
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with a cache that forgets what is dropped, unless `past_key_values` is given."""
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache") is not False and not self._off:
            kwargs["past_key_values"] = CompressedCache(self.get_base_model().config, DynamicContextPruning())
        with self.pruning():
            return super().generate(*args, **kwargs)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the base model for a while: no adapter, nothing dropped."""
        had, self._off = self._off, True
        try:
            with super().disable_adapter():
                yield
        finally:
            self._off = had

    @contextlib.contextmanager
    def pruning(self) -> Iterator[None]:
        """Let the base model drop tokens while the block runs: `with model.pruning(): model.get_base_model()(...)`."""
        if self._off or self._running:
            yield
            return
        base, self._kept = self.get_base_model(), {}
        self._running = True
        try:
            # Layers that gradient checkpointing runs again have nothing new to say about what they keep.
            with self._hooked(self._kept), adapter.recomputing_under(base, lambda: self._hooked({})):
                yield
        finally:
            self._running = False

    @contextlib.contextmanager
    def _hooked(self, kept: dict[int, Tensor]) -> Iterator[None]:
        base = self.get_base_model()
        modules = [base.get_submodule(path) for path in self._paths]

        def arrive(module: nn.Module, hidden: Tensor) -> None:
            interaction = self.parts[str(module.layer_idx)]
            ARRIVING[module] = (interaction, *interaction.project(hidden))

        try:
            with before(modules, arrive), intercept(base, self._attend_with(kept)):
                yield
        finally:
            for module in modules:
                ARRIVING.pop(module, None)

    def _attend_with(self, kept: dict[int, Tensor]) -> Callable[..., Attended]:
        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any
        ) -> Attended:
            if module not in ARRIVING:  # a layer that drops nothing
                return plain(module, query, key, value, mask, **call)
            layer = getattr(key, CACHE_LAYER, None)
            if layer is not None:
                self._check_cache(layer)
                return plain(module, query, key, value, mask, **call)
            if key.shape[2] != query.shape[2]:
                raise ValueError(
                    "this cache does not know which tokens were dropped; give past_key_values="
                    "CompressedCache(model.config, DynamicContextPruning()) with attn_implementation='hf_ext', "
                    "or use_cache=False"
                )
            mask, kept[module.layer_idx] = self._masked(ARRIVING[module], query, key, mask)
            return plain(module, query, key, value, mask, **call)

        return attend

    def _check_cache(self, layer: Any) -> None:
        if not isinstance(layer.policy, DynamicContextPruning):
            raise ValueError(
                f"a DynamicContextPruningModel decides itself what stays: give CompressedCache(model.config, "
                f"DynamicContextPruning()), not {type(layer.policy).__name__}, or run it within model.disable_adapter()"
            )
        if self.training:
            raise ValueError("what a model in training mode drops is not gone yet; call model.eval() to use a cache")

    def _masked(
        self, arriving: tuple[Interaction, Tensor, Tensor], query: Tensor, key: Tensor, mask: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the mask of a pass over a whole text with what is dropped, and what share of the past is kept."""
        interaction, small_queries, small_keys = arriving
        seen = visible(mask, query, key)[:, 0]
        real = seen.diagonal(dim1=1, dim2=2)
        logits = interaction.logits(small_queries, small_keys)
        if not self.training:
            stays = survives(logits, real)
            return hide(mask, ~stays[:, None], query, key), kept_share(stays.float(), seen)
        logs = log_survival(logits, self.alpha, real)
        share = kept_share(logs.exp(), seen)
        if isinstance(mask, Tensor) and mask.is_floating_point():
            least = torch.finfo(mask.dtype).min
            return (mask + logs[:, None].to(mask.dtype)).clamp(min=least), share
        added = logs.to(query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
        return added[:, None], share

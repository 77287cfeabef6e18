"""SWAN-GPT (arXiv:2504.08719): a decoder that keeps working beyond its training length.

Two kinds of layers alternate. Global layers attend to everything and have no positional encoding, so that no
position is ever new to them. Local layers attend to a sliding window with rotary positions, so that no distance is
ever new to them, and their cache is bounded by the window. Beyond the training length a query of a global layer has
more keys to choose from than it ever had; its logits grow with the logarithm of their number to keep it as sharp.

This file and `configuration_swan_gpt.py` import torch and transformers only: they are the Hub repository.
Feed-forward part, norms and rotary tables are transformers' own Llama modules, which is also why a Llama checkpoint
converts without renaming a weight.
"""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_swan_gpt import GLOBAL, LOCAL, SwanGPTConfig


def log_length_scale(positions: torch.Tensor, training_length: int, slope: float) -> torch.Tensor:
    """Factor on the attention logits of the query at each position: `1 + slope * ln(n / training_length)`, at least 1.

    `n = position + 1` is the number of tokens the query sees, so that a token gets the same factor whether it is
    computed alone from a cache or together with the others. The paper's
    factor is logarithmic in the length, too; its constants were not at hand, so the slope is an option, and its default
    is the one that makes the factor `ln(n) / ln(training_length)`.

    Args:
        positions: int tensor `[..., length]`, counted from 0 within each sequence.
        training_length: up to this many tokens the factor is exactly 1.
        slope: growth per factor e in length.

    Returns:
        float32 tensor of the same shape.

    Example:
        >>> log_length_scale(torch.tensor([0, 9, 99]), training_length=10, slope=0.5).tolist()
        [1.0, 1.0, 2.151292562484741]
    """
    excess = (positions + 1).clamp(min=training_length).float() / training_length
    return 1.0 + slope * excess.log()


def own_positions(attention_mask: Any, past: int, length: int, device: torch.device | str) -> torch.Tensor:
    """Positions of the `length` newest tokens within their own row, padding not counted.

    Args:
        attention_mask: `[batch, past + length]` with 0 for padding; anything else is taken as "no padding".
        past: number of tokens already in the cache.
        length: number of new tokens.
        device: where the result lives when there is no mask.

    Returns:
        int tensor `[batch or 1, length]`; padding gets position 0.

    Example:
        >>> own_positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), past=0, length=4, device="cpu").tolist()
        [[0, 0, 0, 1], [0, 1, 2, 3]]
    """
    if (
        isinstance(attention_mask, torch.Tensor)
        and attention_mask.ndim == 2
        and attention_mask.shape[1] == past + length
    ):
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return (torch.arange(length, device=device) + past).unsqueeze(0)


class SwanGPTAttention(nn.Module):
    """Grouped-query attention of one layer, global without positions or local with rotary positions."""

    def __init__(self, config: SwanGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_local = config.layer_types[layer_idx] == LOCAL
        self.sliding_window = config.sliding_window if self.is_local else None
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        query_scale: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; hidden states `[batch, length, hidden]`, `query_scale` `[batch or 1, length]`."""
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)

        if self.is_local:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        else:
            # On the query rather than on `scaling`, which every backend takes as one number for all positions.
            query = (query * query_scale[:, None, :, None]).to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class SwanGPTDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and gated feed-forward part, each with its residual."""

    def __init__(self, config: SwanGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SwanGPTAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Map hidden states `[batch, length, hidden]` to the same shape."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class SwanGPTPreTrainedModel(PreTrainedModel):
    """What the SWAN-GPT classes share: flags, checks and the code that goes with saved weights."""

    config: SwanGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["SwanGPTDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Read by hf_ext's decoding strategies: prompts may be longer than `max_position_embeddings`.
    _extrapolates_length = True
    _can_record_outputs: ClassVar = {"hidden_states": SwanGPTDecoderLayer, "attentions": SwanGPTAttention}

    def __init__(self, config: SwanGPTConfig, *args: Any, **kwargs: Any) -> None:
        config.validate()
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={config.hidden_act!r} is unknown; transformers has {', '.join(ACT2FN)}")
        if (kind := config.rope_parameters["rope_type"]) not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(
                f"rope_type={kind!r} is unknown; transformers has default, {', '.join(ROPE_INIT_FUNCTIONS)}"
            )
        super().__init__(config, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with every class of these files in `auto_map`, not the saved one only."""
        if self.is_remote_code():
            module = type(self).__module__.rpartition(".")[2]
            names = {cls._auto_class: f"{module}.{cls.__name__}" for cls in (SwanGPTModel, SwanGPTForCausalLM)}
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **names}
        super().save_pretrained(save_directory, *args, **kwargs)


class SwanGPTModel(SwanGPTPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: SwanGPTConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(SwanGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: `[batch, length]`; or `inputs_embeds`.
            attention_mask: `[batch, past + length]` with 0 for padding, or a prepared mask for each kind of layer.
            position_ids: `[batch or 1, length]`; counted within each row from `attention_mask` if not given.
            past_key_values: the cache.
            inputs_embeds: `[batch, length, hidden]`.
            use_cache: whether to return a cache.
            **kwargs: go on to the attention backend.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = own_positions(attention_mask, past, inputs_embeds.shape[1], inputs_embeds.device)

        masks = attention_mask
        if not isinstance(masks, dict):  # `generate` prepares them itself for a static cache
            about = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            makers = {GLOBAL: create_causal_mask, LOCAL: create_sliding_window_causal_mask}
            masks = {kind: makers[kind](**about) for kind in set(self.config.layer_types)}

        slope = self.config.log_scale_slope
        if slope is None:
            slope = 1 / math.log(max(self.config.training_length, 2))
        query_scale = log_length_scale(position_ids, self.config.training_length, slope)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        for kind, layer in zip(self.config.layer_types, self.layers, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_embeddings=position_embeddings,
                query_scale=query_scale,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class SwanGPTForCausalLM(SwanGPTPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head.

    Example:
        >>> config = SwanGPTConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        ...                        num_hidden_layers=4, sliding_window=8, max_position_embeddings=16)
        >>> model = SwanGPTForCausalLM(config).eval()
        >>> prompt = torch.arange(40)[None]  # longer than the 16 positions of the configuration
        >>> model.generate(prompt, max_new_tokens=3, do_sample=False).shape
        torch.Size([1, 43])
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SwanGPTConfig) -> None:
        super().__init__(config)
        self.model = SwanGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position; arguments beyond these are those of `SwanGPTModel.forward`.

        Args:
            labels: `[batch, length]`, shifted inside; -100 is ignored. With them the output has a loss.
            logits_to_keep: compute logits for this many last positions, or for the given positions; 0 for all.
            **kwargs: `num_items_in_batch` goes to the loss, everything to the attention backend.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @classmethod
    def from_llama(
        cls,
        llama: PreTrainedModel | str | os.PathLike,
        *,
        global_every: int | None = 4,
        sliding_window: int | None = None,
        **options: Any,
    ) -> "SwanGPTForCausalLM":
        """Convert a Llama checkpoint: same weights, layers of two kinds. Some training should follow.

        Args:
            llama: a `LlamaForCausalLM`, or a folder or Hub name to load one from.
            global_every: layers 0, `global_every`, ... become global without positions. With `None` every layer stays
                rotary, and the result equals the Llama model exactly up to `sliding_window` tokens.
            sliding_window: window of the local layers; half of the context by default, at most 512.
            **options: further `SwanGPTConfig` options that have no counterpart in Llama: `layer_types`,
                `training_length`, `log_scale_slope`.

        Returns:
            A new model with copied weights; `llama` is left as it is.

        Raises:
            ValueError: `llama` is another architecture, or an option is one that the weights decide.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
            ...     num_attention_heads=4, num_hidden_layers=4, max_position_embeddings=64))
            >>> SwanGPTForCausalLM.from_llama(llama).config.layer_types.count("full_attention")
            1
        """
        if isinstance(llama, str | os.PathLike):
            llama = AutoModelForCausalLM.from_pretrained(llama, dtype="auto")
        if not isinstance(llama, LlamaForCausalLM):
            raise ValueError(
                f"cannot convert {type(llama).__name__} (model_type {llama.config.model_type!r}): expected a "
                "LlamaForCausalLM, because every weight is taken over unchanged"
            )
        if getattr(llama, "is_quantized", False):
            raise ValueError("cannot convert quantized weights: load the checkpoint without quantization")
        own = ("layer_types", "log_scale_slope", "training_length")
        if wrong := sorted(set(options) - set(own)):
            raise ValueError(f"cannot set {', '.join(wrong)}: the weights decide that; options are {', '.join(own)}")
        if sliding_window is None:
            sliding_window = max(2, min(512, llama.config.max_position_embeddings // 2))
        shape = {field.name for field in fields(SwanGPTConfig)} - {field.name for field in fields(PreTrainedConfig)}
        shared = {name: copy.deepcopy(value) for name, value in vars(llama.config).items() if name in shape}
        config = SwanGPTConfig(**shared, global_every=global_every, sliding_window=sliding_window, **options)
        model = cls(config)
        # Assigned rather than copied into place, so that dtype and device are those of the source.
        model.load_state_dict({name: weight.clone() for name, weight in llama.state_dict().items()}, assign=True)
        model.tie_weights()
        model.generation_config = copy.deepcopy(llama.generation_config)
        config.dtype = llama.dtype
        return model.to(llama.device).train(llama.training)


SwanGPTModel.register_for_auto_class("AutoModel")
SwanGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")

"""The one place that touches private or moving parts of transformers.

Every function says which part it stands on; `tests/test_adapter.py` is the canary that fails
when a transformers release moves one of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # registration uses this module while transformers itself is being imported
    from transformers import Cache, GenerationConfig, PreTrainedModel, Trainer, TrainerCallback
    from transformers.utils import ModelOutput


def prefill(
    model: PreTrainedModel, input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> ModelOutput:
    """Run the prompt through the model as `generate` does (`GenerationMixin._prefill`).

    Handles an already filled cache, embeddings instead of ids, and chunked prefill.
    """
    return model._prefill(input_ids, config, model_kwargs)


def extend_kwargs(
    model: PreTrainedModel, outputs: ModelOutput, model_kwargs: dict[str, Any], new_tokens: int = 1
) -> dict[str, Any]:
    """Take the cache from `outputs` and lengthen masks and positions by `new_tokens`."""
    return model._update_model_kwargs_for_generation(
        outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder, num_new_tokens=new_tokens
    )


def lengthen_kwargs(model: PreTrainedModel, model_kwargs: Mapping[str, Any], columns: int) -> dict[str, Any]:
    """Return `model_kwargs` with masks and positions of `columns` more tokens, for a prompt that is so much longer."""
    return model._update_model_kwargs_for_generation({}, dict(model_kwargs), num_new_tokens=columns)


def expand_kwargs(model: PreTrainedModel, model_kwargs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Repeat every per-row tensor of `model_kwargs` `times` times (the cache is left alone)."""
    kwargs = dict(model_kwargs)
    encoder_outputs = kwargs.get("encoder_outputs")
    if encoder_outputs is not None:  # transformers expands this one in place
        kwargs["encoder_outputs"] = type(encoder_outputs)(**encoder_outputs)
    return model._expand_inputs_for_generation(
        expand_size=times, is_encoder_decoder=model.config.is_encoder_decoder, input_ids=None, **kwargs
    )[1]


def next_inputs(
    model: PreTrainedModel, tokens: torch.Tensor, model_kwargs: Mapping[str, Any], new_tokens: int = 1
) -> dict[str, Any]:
    """Build the forward arguments for the last `new_tokens` columns of `tokens` after prefill.

    Stands on `next_sequence_length` of `prepare_inputs_for_generation`.
    """
    return model.prepare_inputs_for_generation(tokens, next_sequence_length=new_tokens, **model_kwargs)


def read_with_prompt(model_kwargs: Mapping[str, Any]) -> list[str]:
    """Name the arguments that are read with the prompt and never again: images, sound and the like.

    Stands on `MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL` of `transformers.generation.utils`.
    """
    from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

    return [name for name in model_kwargs if name in MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL]


def any_row_unfinished(model: PreTrainedModel, finished: bool, synced_gpus: bool, device: torch.device) -> bool:
    """Tell whether decoding goes on here or, under `synced_gpus`, in any other process."""
    return model._has_unfinished_sequences(finished, synced_gpus, device=device)


def needs_synced_gpus(model: PreTrainedModel) -> bool:
    """Tell whether processes must call forward equally often (FSDP, DeepSpeed ZeRO-3)."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return sharded and torch.distributed.get_world_size() > 1


def device_of(model: PreTrainedModel) -> torch.device:
    """Return where a model computes; weights that accelerate offloads lie on `meta` until they are used."""
    if model.device.type != "meta":
        return model.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    parts = (part for hook in hooks for part in getattr(hook, "hooks", [hook]))
    places = (getattr(part, "execution_device", None) for part in parts)
    return next((torch.device(place) for place in places if place is not None), model.device)


def adapters_by_row(model: torch.nn.Module) -> str | None:
    """Name what PEFT says for every row of a batch, `adapter_names` or `alora_offsets`, during a call that does.

    Stands on the partial functions that PEFT registers as forward pre-hooks of its layers meanwhile.
    """
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    named = (name for hook in hooks for name in getattr(hook, "keywords", ()))
    return next((name for name in named if name in ("adapter_names", "alora_offsets")), None)


def has_learned_prompt(model: Any) -> bool:
    """Tell whether PEFT puts virtual tokens before the text of this call of `generate`.

    Stands on PEFT's preparation of inputs being the model's own during such a call.
    """
    owner = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", model)
    return owner is not model and bool(getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False))


def special_token(config: GenerationConfig, name: str) -> torch.Tensor | None:
    """Return the tensor `generate` made of `eos_token_id` or `pad_token_id` (`_eos_token_tensor`, ...)."""
    return getattr(config, f"_{name}_token_tensor")


def mask_length(config: GenerationConfig) -> int | None:
    """Length of an all-ones attention mask that `generate` dropped as needless, if it did."""
    return getattr(config, "_mask_length", None)


def is_user_cache(cache: Any) -> bool:
    """Tell whether the caller passed `cache` in, rather than `generate` creating it (`_is_user_defined`)."""
    return bool(getattr(cache, "_is_user_defined", False))


def cache_layers(cache: Cache) -> list[Any]:
    """Return the layers of a cache, those of self- and cross-attention for an encoder-decoder."""
    from transformers import cache_utils

    if isinstance(cache, cache_utils.EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return list(cache.layers)


def row_editing_problem(cache: Cache | None) -> str | None:
    """Say why rows of `cache` cannot be repeated and selected, or None where they can.

    Stands on the layer classes of `transformers.cache_utils`.
    """
    from transformers import cache_utils

    if cache is None:
        return "the model returned no cache"
    if not isinstance(cache, cache_utils.Cache):
        return f"the model's state is a {type(cache).__name__}, not a transformers Cache"
    if not any(getattr(layer, "is_initialized", True) for layer in cache_layers(cache)):
        return "the model put nothing into it"
    for layer in cache_layers(cache):
        kind = type(layer).__name__
        if isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin):
            return f"layer {kind} keeps a recurrent state"
        if isinstance(layer, cache_utils.QuantizedLayer):
            return f"layer {kind} is quantized"
        if not (hasattr(layer, "batch_repeat_interleave") and hasattr(layer, "batch_select_indices")):
            return f"layer {kind} has a fixed batch size"
    return None


class CacheRewind:
    """Keeps a cache able to forget its last token at the end of a call that looks one ahead.

    Sliding-window layers drop tokens that a rewind would need, unless told to record them
    (`Cache.activate_past_recording`), and then have to be trimmed after every step.

    Args:
        cache: the cache of the run.
        needed: whether anybody will use the cache after the call; if not, this does nothing.
    """

    def __init__(self, cache: Cache, needed: bool) -> None:
        self.cache, self.needed = cache, needed
        if needed:
            cache.activate_past_recording()

    def step(self, last: bool) -> None:
        """After a step: trim what is out of every window or, at the last step, forget one token."""
        if self.needed:
            self.cache.crop(-1 if last else 0)

    def finish(self) -> None:
        """After the last step: stop recording, so that the cache is again as `generate` leaves it."""
        for layer in cache_layers(self.cache) if self.needed else ():
            if hasattr(layer, "record_past"):
                layer.record_past = False


def default_generation_values() -> dict[str, Any]:
    """Values `generate` fills in for settings that nobody gave (`_get_default_generation_params`)."""
    from transformers import GenerationConfig

    return GenerationConfig._get_default_generation_params()


def register_model_lazily(auto_class: Any, config: type, target: str) -> None:
    """Register an architecture with an Auto class without importing its code.

    `AutoModel.register` wants the class itself. The mappings are filled while transformers is
    half imported, when modeling code cannot be imported yet; so this adds a name and a module
    that resolves it, exactly as the mappings hold transformers' own architectures
    (`_LazyAutoMapping`).

    Args:
        auto_class: `AutoModelForCausalLM` or another model Auto class.
        config: the architecture's registered config class.
        target: the model class as `"package.module:Class"`.
    """
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    module, _, class_name = target.partition(":")
    mapping = auto_class._model_mapping
    model_type: str = config.model_type  # type: ignore[attr-defined]
    mapping._config_mapping[model_type] = config.__name__
    mapping._reverse_config_mapping[config.__name__] = model_type
    mapping._model_mapping[model_type] = class_name
    mapping._modules[model_type_to_module_name(model_type)] = _LateModule(module, config)


class _LateModule(ModuleType):
    """Stands for a module with modeling code and imports it when a name is looked up."""

    def __init__(self, target: str, config: type) -> None:
        super().__init__(target)
        setattr(self, config.__name__, config)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def remote_code_imports(file: str | Path) -> tuple[set[str], set[str]]:
    """Read a file as the loader of remote code does (`transformers.dynamic_module_utils`).

    Returns:
        The modules beside the file that it would copy, and the packages it would insist on.
    """
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    return set(get_relative_imports(file)), set(get_imports(file))


def checkpoint_activations(model: PreTrainedModel, **options: Any) -> None:
    """Turn gradient checkpointing on; `options` go to `torch.utils.checkpoint.checkpoint`.

    `activation_checkpointing_enable` replaced `gradient_checkpointing_enable` after transformers 5.17.

    Raises:
        ValueError: the model does not support it.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def use_full_layers(cache: Cache | None) -> None:
    """Make the sliding-window layers of an empty cache keep every column.

    A windowed layer drops columns for good, so its rows can neither be moved nor forget tokens. The
    attention mask goes by column, so the window still holds.
    """
    from transformers import cache_utils

    if isinstance(cache, cache_utils.Cache) and cache.get_seq_length() == 0:
        cache.layers = [
            cache_utils.DynamicLayer() if type(layer) is cache_utils.DynamicSlidingWindowLayer else layer
            for layer in cache.layers
        ]


def column_editing_problem(cache: Any) -> str | None:
    """Say why the columns of a cache cannot be moved row by row, or None where they can."""
    from transformers import cache_utils

    if cache is None:
        return "the model returned no cache"
    if not isinstance(cache, cache_utils.Cache):
        return f"the model's state is a {type(cache).__name__}, not a transformers Cache"
    if isinstance(cache, cache_utils.EncoderDecoderCache):
        return "it is that of an encoder-decoder"
    if getattr(cache, "offloading", False):
        return "it is offloaded to the CPU"
    plain = (cache_utils.DynamicLayer, getattr(cache_utils, "DummyLayer", cache_utils.DynamicLayer))
    for layer in cache.layers:
        if type(layer) not in plain:
            return f"it has a {type(layer).__name__}, whose columns are not plain tensors"
    return None


def _filled_layers(cache: Cache) -> list[Any]:
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None and layer.keys.numel()]


def rearrange_cache(cache: Cache, rows: torch.Tensor, shift: torch.Tensor, trim: int) -> None:
    """Select rows of a cache of plain dynamic layers, roll each to the right, cut columns off the left.

    Args:
        cache: the cache, changed in place.
        rows: `(new rows,)` int64, the old row of each new one.
        shift: `(new rows,)` int64, columns that move from the right end to the left end.
        trim: columns to cut off the left afterwards.
    """
    for layer in _filled_layers(cache):
        for name in ("keys", "values"):
            states = getattr(layer, name)
            states = states.index_select(0, rows.to(states.device))
            if bool(shift.any()):
                length = states.shape[-2]
                columns = torch.arange(length, device=states.device) - shift.to(states.device)[:, None]
                states = states.gather(2, (columns % length)[:, None, :, None].expand(states.shape))
            setattr(layer, name, states[:, :, trim:])


def copy_columns(cache: Cache, row: int, start: int, stop: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copy columns `start` to `stop` of one row: for every filled layer, keys and values `(heads, columns, width)`."""
    return [
        (layer.keys[row, :, start:stop].clone(), layer.values[row, :, start:stop].clone())
        for layer in _filled_layers(cache)
    ]


def refill_cache(cache: Cache, rows: list[list[tuple[torch.Tensor, torch.Tensor]]], starts: list[int]) -> None:
    """Fill a cache from copies of single rows; the reverse of `copy_columns`.

    Args:
        cache: the cache they were copied from; its content is replaced.
        rows: what `copy_columns` returned for each row.
        starts: the column at which each row begins; the rest is zero.
    """
    for index, layer in enumerate(_filled_layers(cache)):
        for which, name in enumerate(("keys", "values")):
            parts = [row[index][which] for row in rows]
            length = max(start + part.shape[1] for start, part in zip(starts, parts, strict=True))
            filled = parts[0].new_zeros(len(parts), parts[0].shape[0], length, parts[0].shape[2])
            for new, start, part in zip(filled, starts, parts, strict=True):
                new[:, start : start + part.shape[1]] = part
            setattr(layer, name, filled)


_ROW_BLIND = (  # what they do to a row depends on nothing but the row's own ids and scores
    "EosTokenCriteria", "MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor", "MinPLogitsWarper", "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
    "TypicalLogitsWarper",
)  # fmt: skip
_ROW_STATE = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


def ignores_row_number(part: Any) -> bool:
    """Tell whether a logits processor or stopping criterion is known to treat all rows of a batch alike."""
    kind = type(part)
    return kind.__module__.startswith("transformers.generation.") and kind.__name__ in _ROW_BLIND


def keeps_row_state(part: Any) -> bool:
    """Tell whether a logits processor is known to keep a state from step to step for every row."""
    return any(kind.__name__ in _ROW_STATE for kind in type(part).__mro__)


def prefix_function(part: Any) -> Callable[[int, torch.Tensor], list[int]] | None:
    """Return the user's `prefix_allowed_tokens_fn` if that is what a logits processor applies."""
    return getattr(part, "_prefix_allowed_tokens_fn", None)


def attention_implementation(model: PreTrainedModel) -> str:
    """Name of the attention that a model runs (`config._attn_implementation` of its text part)."""
    return model.config.get_text_config(decoder=True)._attn_implementation


def cache_layer_base() -> type:
    """Return the class that layers of a cache derive from (`transformers.cache_utils.CacheLayerMixin`)."""
    from transformers import cache_utils

    return cache_utils.CacheLayerMixin


def empty_cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache with the layers that suit the model, as its forward would make itself."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def row_addressing_problem(cache: Any) -> str | None:
    """Say why the tokens of a cache cannot be stored row by row, or None where they can."""
    from transformers import cache_utils

    if cache is None:
        return "the model returned no cache"
    if not isinstance(cache, cache_utils.Cache):
        return f"the model's state is a {type(cache).__name__}, not a transformers Cache"
    if isinstance(cache, cache_utils.EncoderDecoderCache):
        return "it is that of an encoder-decoder"
    if getattr(cache, "offloading", False):
        return "it is offloaded to the CPU"
    known = (
        cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer, cache_utils.StaticLayer,
        cache_utils.StaticSlidingWindowLayer, getattr(cache_utils, "DummyLayer", cache_utils.DynamicLayer),
    )  # fmt: skip
    for layer in cache.layers:
        if isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin):
            return f"layer {type(layer).__name__} keeps a recurrent state"
        if type(layer) not in known:
            return f"it has a {type(layer).__name__}, whose tokens are not plain tensors"
    return None


def position_table(model: PreTrainedModel) -> int | None:
    """Return the length of a decoder's table of positions, or None where it computes them and knows no last one.

    Stands on the buffers `inv_freq` of rotary embeddings and on the sinusoidal tables that grow by `make_weights`.
    """
    computed = any(name.endswith("inv_freq") for name, _ in model.named_buffers())
    if computed or any(hasattr(module, "make_weights") for module in model.modules()):
        return None
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def rotation_switch(model: PreTrainedModel) -> tuple[str, int] | None:
    """Return kind and place of what changes a model's rotations with the length of the text, or None if nothing does.

    The rotations of a whole forward pass are others once a position in it reaches that place: other ones for good
    (`"longrope"`), or other ones for every length (`"dynamic"`). Stands on `rope_type`, `original_max_seq_len` and
    `config.rope_parameters` of the modules that compute rotations (`modeling_rope_utils`).
    """
    found = []
    for module in model.modules():
        of_kind = getattr(module, "rope_type", None)
        for layer, name in of_kind.items() if isinstance(of_kind, dict) else [(None, of_kind)]:
            if isinstance(name, str) and "dynamic" in name:
                found.append(("dynamic", int(module.original_max_seq_len)))  # type: ignore[arg-type]
            elif name == "longrope":
                parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
                parameters = parameters if layer is None else parameters[layer]
                found.append(("longrope", int(parameters["original_max_position_embeddings"])))
    return min(found, key=lambda switch: (switch[1], switch[0]), default=None)


def layer_window(layer: Any) -> int | None:
    """Return the sliding window of a cache layer, or None if it keeps all tokens."""
    from transformers import cache_utils

    if isinstance(layer, cache_utils.DynamicSlidingWindowLayer):
        return int(layer.sliding_window)
    if isinstance(layer, cache_utils.StaticSlidingWindowLayer):
        return int(layer.max_cache_len)
    return None


def layer_grows(layer: Any) -> bool:
    """Tell whether a cache layer takes any number of tokens, rather than being of fixed size."""
    from transformers import cache_utils

    return not isinstance(layer, cache_utils.StaticLayer)


def layer_tensors(layer: Any) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """Return keys and values `(batch, heads, columns, width)` of what a layer holds, and columns it has dropped.

    None for a layer that holds nothing (one that shares the keys of another).
    """
    from transformers import cache_utils

    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or not keys.numel():
        return None
    if isinstance(layer, cache_utils.StaticSlidingWindowLayer):
        seen = int(layer.cumulative_length_int)
        held = min(seen, keys.shape[2])
        return keys[:, :, :held], values[:, :, :held], seen - held
    if isinstance(layer, cache_utils.StaticLayer):
        held = int(layer.cumulative_length)
        return keys[:, :, :held], values[:, :, :held], 0
    return keys, values, max(int(layer.get_seq_length()) - keys.shape[2], 0)


def layer_buffers(layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the whole tensors of a layer of fixed size that keeps all tokens, or None for others."""
    from transformers import cache_utils

    static = isinstance(layer, cache_utils.StaticLayer) and not isinstance(layer, cache_utils.StaticSlidingWindowLayer)
    return (layer.keys, layer.values) if static and layer.is_initialized else None


def refill_layer(layer: Any, keys: torch.Tensor, values: torch.Tensor, dropped: int) -> None:
    """Make a layer hold the last columns of a sequence; the reverse of `layer_tensors`.

    Args:
        layer: a layer that grows, or one of which `layer_tensors` has returned tensors.
        keys: `(batch, heads, columns, width)`.
        values: likewise.
        dropped: columns of the sequence before them.

    Raises:
        ValueError: a layer of fixed size is too small.
    """
    from transformers import cache_utils

    columns = keys.shape[2]
    if isinstance(layer, cache_utils.StaticLayer):
        sliding = isinstance(layer, cache_utils.StaticSlidingWindowLayer)
        if sliding and columns > layer.max_cache_len:
            dropped, columns = dropped + columns - layer.max_cache_len, layer.max_cache_len
        if columns > layer.keys.shape[2]:
            raise ValueError(f"the static cache has {layer.keys.shape[2]} columns, the sequences need {columns}")
        layer.keys[:, :, :columns].copy_(keys[:, :, -columns:])
        layer.values[:, :, :columns].copy_(values[:, :, -columns:])
        layer.cumulative_length.fill_(dropped + columns)
        if sliding:
            layer.cumulative_length_int = dropped + columns
        return
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    if isinstance(layer, cache_utils.DynamicSlidingWindowLayer):
        layer.cumulative_length = dropped + columns
        keys, values = keys[:, :, -layer.sliding_window + 1 :], values[:, :, -layer.sliding_window + 1 :]
    layer.keys, layer.values = keys.contiguous(), values.contiguous()


_IDS_BLIND = (  # what they do to scores depends on nothing but the scores
    "EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
    "TypicalLogitsWarper",
)  # fmt: skip


def ignores_ids(part: Any) -> bool:
    """Tell whether a logits processor is known to look at the scores only, and not at the ids before them."""
    kind = type(part)
    return kind.__module__.startswith("transformers.generation.") and kind.__name__ in _IDS_BLIND


def release_layer(layer: Any) -> None:
    """Let go of the tensors of a layer that grows, not of its shape; `refill_layer` fills it again."""
    from transformers import cache_utils

    if isinstance(layer, cache_utils.DynamicLayer) and layer.is_initialized:
        layer.keys, layer.values = layer.keys.new_empty(0), layer.values.new_empty(0)


def is_loaded(module: torch.nn.Module) -> bool:
    """Tell whether a module's weights come from a checkpoint, and must not be drawn anew (`_is_hf_initialized`)."""
    return bool(getattr(module, "_is_hf_initialized", False))


def attention_mappings() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the registered attention functions and mask functions by name, as all models look them up.

    Stands on `_global_mapping` of `AttentionInterface` and `AttentionMaskInterface`: the public `register` can
    neither tell what is there nor take a name back.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    return AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping


@functools.cache
def attends_by_code_of_its_own(config: type) -> bool:
    """Tell whether the models of a class of configurations run attention of their own, whatever its name is.

    `from_pretrained` takes any registered name for them, and only the masks become those of that name. Stands on
    `config_class` and on `_can_set_attn_implementation`, which says no of code that it cannot read, too.
    """
    import inspect
    import sys

    from transformers import PreTrainedModel

    def known(model: type[PreTrainedModel]) -> bool:
        try:
            inspect.getsource(sys.modules[model.__module__])
        except (KeyError, OSError, TypeError):
            return False
        return not model._can_set_attn_implementation()

    models = list(PreTrainedModel.__subclasses__())
    for model in models:  # grows on the way
        models += model.__subclasses__()
    own = [model for model in models if model.config_class is config]
    return bool(own) and all(map(known, own))


def eviction_problem(config: Any) -> str | None:
    """Say why entries cannot be dropped from the cache of a model, or None where they can.

    Learned biases, ALiBi and local windows in code of a model's own count distances by the entries that are there.
    Rotations by the positions of the tokens do not. Stands on `rope_parameters`, `alibi` and
    `relative_attention_num_buckets` of configurations.
    """
    kind: type = type(config)
    rotates = getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False)
    if hasattr(config, "relative_attention_num_buckets"):
        reason = "it has a learned position bias"
    elif attends_by_code_of_its_own(kind) and not rotates:
        reason = "its attention is code of its own, with ALiBi or local windows"
    else:
        return None
    return f"{reason}, which counts distances by the entries that are there; when some are dropped, others seem nearer"


def sdpa_function() -> Callable[..., tuple[torch.Tensor, None]]:
    """Return what transformers runs for `attn_implementation="sdpa"` (`integrations.sdpa_attention`)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def sdpa_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Call `sdpa_function`."""
    return sdpa_function()(*args, **kwargs)


def sdpa_mask(**kwargs: Any) -> torch.Tensor | None:
    """Call what transformers builds masks with for `attn_implementation="sdpa"` (`masking_utils.sdpa_mask`)."""
    from transformers.masking_utils import sdpa_mask as build

    return build(**kwargs)


def mask_is_needless(
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    attention_mask: torch.Tensor | None,
    local_size: int | None,
    allow_is_causal_skip: bool,
    allow_is_bidirectional_skip: bool,
) -> bool:
    """Tell whether `sdpa_mask` would return None: the attention function's `is_causal` says it all.

    Stands on `_ignore_causal_mask_sdpa` and `_ignore_bidirectional_mask_sdpa`. The arguments are those of a mask
    function, `attention_mask` the one of two dimensions.
    """
    from transformers import masking_utils

    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if allow_is_causal_skip and masking_utils._ignore_causal_mask_sdpa(
        padding, q_length, kv_length, q_offset, kv_offset, local_size
    ):
        return True
    return allow_is_bidirectional_skip and masking_utils._ignore_bidirectional_mask_sdpa(padding, kv_length, local_size)


#: Factories of mask functions in `transformers.masking_utils`, what they are called here, and what they close over.
_MASK_FACTORIES = {
    "sliding_window_overlay": ("window", ("sliding_window",)),
    "sliding_window_bidirectional_overlay": ("near", ("sliding_window",)),
    "chunked_overlay": ("chunks", ("chunk_size", "left_padding")),
    "blockwise_overlay": ("blocks", ("block_sequence_ids",)),
    "padding_mask_function": ("padding", ("padding_mask",)),
    "packed_sequence_mask_function": ("sequences", ("packed_sequence_mask",)),
}


def describe_mask_function(function: Callable[..., Any]) -> list[tuple[Any, ...]] | None:
    """Say of which parts a mask function consists, all of which must hold.

    Stands on the factories of `transformers.masking_utils`: a closure is recognised by its code, which must be
    the one that the factory makes, and read by the names of its variables.

    Args:
        function: what transformers gives to mask functions as `mask_function`.

    Returns:
        The parts, each a kind and its values, with `q` and `k` for the indices of query and key, or None if
        there is one that is not known:

        - `("causal",)`: `k <= q`; `("everything",)`: all.
        - `("window", n)`: `k > q - n`; `("near", n)`: `abs(q - k) <= n`.
        - `("chunks", n, left)`: equal `(index - left[row]) // n`.
        - `("sequences", ids)`: equal `ids[row, index]`; `("blocks", ids)`: the same, and not negative.
        - `("padding", mask)`: `mask[row, k]`.
        - `("renumbered", numbers, parts)`: the parts hold for `numbers[row, index]` instead of the indices.
        - `("any", parts, parts, ...)`: one of several lists of parts holds.
    """
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return [("causal",)]
    if function is masking_utils.bidirectional_mask_function:
        return [("everything",)]
    if torch.compiler.is_compiling():  # where a closure cannot be looked into
        return None
    code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not closure:
        return None
    values = {name: cell.cell_contents for name, cell in zip(code.co_freevars, closure, strict=True)}

    def made_by(name: str) -> bool:
        factory = getattr(masking_utils, name, None)  # some came after transformers 5.17
        return factory is not None and any(constant is code for constant in factory.__code__.co_consts)

    for name, (kind, variables) in _MASK_FACTORIES.items():
        if made_by(name):
            return [(kind, *(values[variable] for variable in variables))]
    if made_by("remap_positions_for_packed_sequence"):
        inner = describe_mask_function(values["mask_function"])
        return None if inner is None else [("renumbered", values["position_ids"], inner)]
    if made_by("and_masks") or made_by("or_masks"):
        described = [describe_mask_function(member) for member in values["mask_functions"]]
        members = [parts for parts in described if parts is not None]
        if len(members) < len(described):
            return None
        return [part for member in members for part in member] if made_by("and_masks") else [("any", *members)]
    return None


def attention_configs(model: torch.nn.Module) -> list[Any]:
    """Return the configs, each once, from which attention modules of a model read which attention to run.

    Raises:
        ValueError: a part of the model does not look its attention up in transformers' `AttentionInterface`.
    """
    from transformers import PretrainedConfig, PreTrainedModel

    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            raise ValueError(
                f"the attention of {type(module).__name__} cannot be replaced: its code does not use transformers' "
                "AttentionInterface"
            )
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config = config.get_text_config(decoder=True)
            found.setdefault(id(config), config)
    return list(found.values())


def attention_of(config: Any) -> str:
    """Return the name of the attention that modules with this config run."""
    return config._attn_implementation or "eager"


def switch_attention(config: Any, name: str) -> None:
    """Let modules with this config run another attention (`_attn_implementation_internal`), nothing else."""
    config._attn_implementation_internal = name


def attention_function(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    """Return what transformers calls for an attention module under the implementation of this name.

    The eager one is not registered; it is `eager_attention_forward` of the file that a module's class is in.

    Raises:
        ValueError: there is none.
    """
    import sys

    from transformers import AttentionInterface

    if name != "eager":
        return AttentionInterface()[name]
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise ValueError(
        f"found no eager_attention_forward beside {type(module).__name__}; load the model with another "
        "attn_implementation, such as 'sdpa'"
    )


def register_attention_like(name: str, function: Callable[..., Any], own: str) -> None:
    """Register an attention function under a new name, with the masks of the implementation called `own`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    masks = AttentionMaskInterface()
    if own in masks.valid_keys():
        AttentionMaskInterface.register(name, masks[own])


def masks_like(name: str, others: Iterable[str]) -> str | None:
    """Return the one of some implementations that has the same mask function as `name`, or None."""
    masks = attention_mappings()[1]
    own = masks.get(name)
    return next((other for other in others if own is not None and masks.get(other) is own), None)


def first_inputs(model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Build the forward arguments for a prompt, before anything is cached (`is_first_iteration`)."""
    return model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=input_ids.shape[1], is_first_iteration=True, **model_kwargs
    )


def states_of(model_kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the caches and recurrent states among forward arguments, whatever the model calls them.

    Stands on `ALL_CACHE_NAMES` of `transformers.generation.utils`.
    """
    from transformers.generation.utils import ALL_CACHE_NAMES

    return [model_kwargs[name] for name in ALL_CACHE_NAMES if model_kwargs.get(name) is not None]


def is_user_state(state: Any) -> bool:
    """Tell whether the caller passed a cache or state in: `generate` makes no states, and marks caches of others."""
    from transformers import Cache

    return state is not None and (not isinstance(state, Cache) or is_user_cache(state))


def compression_problem(layers: Iterable[Any]) -> str | None:
    """Say why the layers of a cache cannot be compressed, or None where they can.

    Stands on the layer classes of `transformers.cache_utils`.
    """
    from transformers import cache_utils

    plain = (
        cache_utils.DynamicLayer,
        cache_utils.DynamicSlidingWindowLayer,
        getattr(cache_utils, "DummyLayer", cache_utils.DynamicLayer),
    )
    found = list(layers)
    if not found:
        return "its config does not say how many layers it has"
    for layer in found:
        if type(layer) not in plain:
            return f"it has a {type(layer).__name__}, which is no list of keys and values"
    return None


def is_empty_layer(layer: Any) -> bool:
    """Tell whether a cache layer never holds anything, because its model's layer uses those of another one."""
    from transformers import cache_utils

    kind = getattr(cache_utils, "DummyLayer", None)
    return kind is not None and type(layer) is kind


def tensors_of_layer(layer: Any) -> list[torch.Tensor]:
    """Return keys and values that a stock dynamic layer holds."""
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


@contextlib.contextmanager
def recomputing_under(model: torch.nn.Module, context: Callable[[], Any]) -> Iterator[None]:
    """Let layers that gradient checkpointing wraps in this block be recomputed under a context of their own.

    Stands on `_gradient_checkpointing_func`, which the layers call with what to run, and on its options being those of
    `torch.utils.checkpoint.checkpoint`.

    Args:
        model: some of whose layers may be checkpointed.
        context: makes a context manager, which is entered each time that the backward pass runs a layer again.
    """
    name = "_gradient_checkpointing_func"
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and hasattr(m, name)]
    had = [getattr(layer, name) for layer in layers]
    for layer, function in zip(layers, had, strict=True):
        again = functools.partial(function, context_fn=lambda: (contextlib.nullcontext(), context()))
        setattr(layer, name, again)
    try:
        yield
    finally:
        for layer, function in zip(layers, had, strict=True):
            setattr(layer, name, function)


def cached_tokens(cache: Cache | None) -> int:
    """Return how many tokens a cache holds; 0 where it has nothing but recurrent states, which count none.

    `Cache.get_seq_length` raises there.
    """
    from transformers import cache_utils

    if cache is None:
        return 0
    layers = cache_layers(cache) if isinstance(cache, cache_utils.Cache) else []
    if layers and not any(isinstance(layer, cache_utils.CacheLayerMixin) for layer in layers):
        return 0
    return int(cache.get_seq_length())


def prepared_inputs(trainer: Any, batch: Mapping[str, Any]) -> Any:
    """Return a batch as the Trainer hands it to its model: on the device, in the dtype that it wants.

    Stands on `Trainer._prepare_inputs`.
    """
    return trainer._prepare_inputs(dict(batch))


def has_causal_loss(model: Any) -> bool:
    """Tell whether a model's loss is transformers' own next-token loss, not one that somebody gave it.

    Stands on `PreTrainedModel.loss_function`, `_loss_function` behind it, and `LOSS_MAPPING`.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING

    return "_loss_function" not in vars(model) and model.loss_function is LOSS_MAPPING["ForCausalLM"]


def give_loss_back(model: Any, instead: Any) -> None:
    """Let a model compute its loss as it did before `instead` was put in its place; do nothing if that is not there.

    Stands on `_loss_function`, where the setter of `PreTrainedModel.loss_function` keeps what it was given.
    """
    if vars(model).get("_loss_function") is instead:
        del model._loss_function


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """Return the trainer that is calling this callback, None if none is.

    Stands on `Trainer.callback_handler` and on the trainer's being among the callers: an event hands a callback the
    model, the optimizer and the dataloaders, but not the trainer.
    """
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and any(one is callback for one in found.callback_handler.callbacks):
            return found
        frame = frame.f_back
    return None

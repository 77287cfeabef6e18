"""Canaries: one for every function of `hf_ext.adapter`, to fail when a transformers release moves what it stands on.

And the other half of that bargain: nothing else in the package touches private parts of transformers.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LlamaForCausalLM,
    PrefixConstrainedLogitsProcessor,
    PretrainedConfig,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutput

from hf_ext import adapter
from hf_ext.testing import tiny_models

ROOT = Path(__file__).resolve().parents[1]
IDS, MASK = tiny_models.prompts()


@contextlib.contextmanager
def stands_on(part: str) -> Iterator[None]:
    """Say in the failure which part of transformers has moved."""
    try:
        yield
    except Exception as error:
        raise AssertionError(
            f"transformers {transformers.__version__} has moved {part}, which hf_ext/adapter.py stands on: "
            f"{type(error).__name__}: {error}"
        ) from error


def prepared(kind: str = "llama", **settings: Any) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return the config and the forward arguments that `generate` hands to a callable."""
    seen: list[Any] = []

    def spy(model: Any, input_ids: torch.Tensor, generation_config: Any = None, **kwargs: Any) -> torch.Tensor:
        seen.extend([generation_config, {k: v for k, v in kwargs.items() if not k.startswith(("logits_pr", "stop"))}])
        return input_ids

    settings = {"attention_mask": MASK, "max_new_tokens": 2, **settings}
    with stands_on("the call of a custom_generate callable"):
        tiny_models.shared(kind).generate(IDS, custom_generate=spy, **settings)
    return seen[0], seen[1]


def filled(kind: str = "llama", rows: int = 3) -> Any:
    """Return the cache of a model after a prompt."""
    with torch.no_grad():
        return tiny_models.shared(kind)(IDS[:rows], use_cache=True).past_key_values


def test_every_function_of_the_adapter_has_a_canary() -> None:
    functions = [
        name
        for name, value in vars(adapter).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == adapter.__name__
    ]
    without = sorted(name for name in functions if f"test_{name}" not in globals())
    assert not without, f"write a canary test_<name> in tests/test_adapter.py for {', '.join(without)}"


@torch.no_grad()
def test_prefill() -> None:
    model = tiny_models.shared("llama")
    config, kwargs = prepared()
    with stands_on("GenerationMixin._prefill"):
        out = adapter.prefill(model, IDS, config, kwargs)
        plain = model(IDS, attention_mask=MASK, position_ids=kwargs["position_ids"])
        assert (out.logits[:, -1] - plain.logits[:, -1]).abs().max() < 1e-5
        assert kwargs["past_key_values"].get_seq_length() == IDS.shape[1]


@torch.no_grad()
def test_extend_kwargs() -> None:
    model = tiny_models.shared("llama")
    config, kwargs = prepared()
    out = adapter.prefill(model, IDS, config, kwargs)
    with stands_on("GenerationMixin._update_model_kwargs_for_generation"):
        longer = adapter.extend_kwargs(model, out, dict(kwargs), new_tokens=2)
        assert longer["attention_mask"].shape[1] == IDS.shape[1] + 2
        assert longer["position_ids"][:, -2:].tolist() == [[n, n + 1] for n in MASK.sum(1).tolist()]
        assert longer["past_key_values"] is out.past_key_values


def test_lengthen_kwargs() -> None:
    _, kwargs = prepared()
    with stands_on("GenerationMixin._update_model_kwargs_for_generation without outputs"):
        longer = adapter.lengthen_kwargs(tiny_models.shared("llama"), kwargs, 2)
        assert longer["attention_mask"].shape[1] == IDS.shape[1] + 2
        assert longer["position_ids"][:, -2:].tolist() == [[n, n + 1] for n in MASK.sum(1).tolist()]
        assert longer["past_key_values"] is kwargs["past_key_values"]
        assert kwargs["attention_mask"].shape[1] == IDS.shape[1], "the caller's arguments were changed"


def test_expand_kwargs() -> None:
    states = torch.arange(6.0).view(3, 2, 1)
    given = {"attention_mask": MASK, "encoder_outputs": BaseModelOutput(last_hidden_state=states), "use_cache": True}
    with stands_on("GenerationMixin._expand_inputs_for_generation"):
        wide = adapter.expand_kwargs(tiny_models.shared("bart"), given, 2)
        assert torch.equal(wide["attention_mask"], MASK.repeat_interleave(2, 0))
        assert torch.equal(wide["encoder_outputs"].last_hidden_state, states.repeat_interleave(2, 0))
        assert given["encoder_outputs"].last_hidden_state is states, "the caller's encoder_outputs were changed"


def test_next_inputs() -> None:
    model, (_, kwargs) = tiny_models.shared("llama"), prepared()
    with stands_on("next_sequence_length of prepare_inputs_for_generation"):
        for width in (1, 3):
            inputs = adapter.next_inputs(model, IDS, kwargs, width)
            assert torch.equal(inputs["input_ids"], IDS[:, -width:])
            assert torch.equal(inputs["position_ids"], kwargs["position_ids"][:, -width:])
            assert inputs["past_key_values"] is kwargs["past_key_values"]


def test_any_row_unfinished() -> None:
    with stands_on("GenerationMixin._has_unfinished_sequences"):
        for finished in (False, True):
            going_on = adapter.any_row_unfinished(tiny_models.shared("llama"), finished, False, torch.device("cpu"))
            assert going_on is not finished


def test_needs_synced_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.shared("llama")
    with stands_on("is_fsdp_managed_module or is_deepspeed_zero3_enabled of transformers.integrations"):
        assert adapter.needs_synced_gpus(model) is False
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert adapter.needs_synced_gpus(model) is False
        monkeypatch.setattr("transformers.integrations.fsdp.is_fsdp_managed_module", lambda _: True)
        assert adapter.needs_synced_gpus(model) is True


def test_device_of() -> None:
    from accelerate import cpu_offload

    model = tiny_models.build("llama")
    assert adapter.device_of(model) == torch.device("cpu")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with stands_on("_hf_hook of accelerate and execution_device of its hooks"):
        assert model.device.type == "meta"
        assert adapter.device_of(model) == torch.device("cpu")


def adapted(config: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(tiny_models.build("llama"), config).eval()


def seen_in_generate(model: Any, look: Any, **settings: Any) -> list[Any]:
    """Return what a function of the inner model gives, before, during and after a call of PEFT's `generate`."""
    found = [look(model.get_base_model())]

    def spy(inner: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        found.append(look(inner))
        return input_ids

    model.generate(input_ids=IDS, attention_mask=MASK, custom_generate=spy, max_new_tokens=1, **settings)
    return [*found, look(model.get_base_model())]


def test_adapters_by_row() -> None:
    from peft import LoraConfig

    with stands_on("the pre-hooks that PEFT hands adapter_names on with"):
        model = adapted(LoraConfig(r=2, target_modules=["q_proj"]))
        assert seen_in_generate(model, adapter.adapters_by_row) == [None] * 3
        names = ["default", "__base__", "default"]
        assert seen_in_generate(model, adapter.adapters_by_row, adapter_names=names) == [None, "adapter_names", None]


def test_has_learned_prompt() -> None:
    from peft import LoraConfig, PromptTuningConfig

    with stands_on("PEFT's prepare_inputs_for_generation on the model inside, during generate"):
        tuned = adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        assert seen_in_generate(tuned, adapter.has_learned_prompt) == [False, True, False]
        lora = adapted(LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
        assert seen_in_generate(lora, adapter.has_learned_prompt) == [False] * 3


def test_read_with_prompt() -> None:
    with stands_on("MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL of transformers.generation.utils"):
        given = {"attention_mask": MASK, "pixel_values": IDS, "input_features": IDS, "mm_token_type_ids": IDS}
        assert adapter.read_with_prompt(given) == ["pixel_values", "input_features"]


def test_special_token() -> None:
    with stands_on("GenerationConfig._eos_token_tensor and _pad_token_tensor"):
        config, _ = prepared(eos_token_id=[5, 6], pad_token_id=0)
        eos, pad = (adapter.special_token(config, name) for name in ("eos", "pad"))
        assert eos is not None
        assert pad is not None
        assert (eos.tolist(), int(pad)) == ([5, 6], 0)
        assert adapter.special_token(prepared()[0], "eos") is None


def test_mask_length() -> None:
    with stands_on("GenerationConfig._mask_length"):
        config, kwargs = prepared(attention_mask=torch.ones_like(IDS))
        if kwargs.get("attention_mask") is None:  # older releases keep a mask of ones
            assert adapter.mask_length(config) == IDS.shape[1]
        assert adapter.mask_length(prepared()[0]) is None


def test_is_user_cache() -> None:
    with stands_on("Cache._is_user_defined, which generate sets"):
        assert adapter.is_user_cache(prepared()[1]["past_key_values"]) is False
        config = tiny_models.shared("llama").config
        assert adapter.is_user_cache(prepared(past_key_values=DynamicCache(config=config))[1]["past_key_values"])


def test_cache_layers() -> None:
    with stands_on("Cache.layers"):
        one, two = filled(), filled()
        assert adapter.cache_layers(one) == one.layers
        assert adapter.cache_layers(EncoderDecoderCache(one, two)) == [*one.layers, *two.layers]


def test_row_editing_problem() -> None:
    class Quantized(QuantizedLayer):
        def __init__(self) -> None:
            self.is_initialized = True

        def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
            return tensor

        def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
            return q_tensor

    config = tiny_models.shared("llama").config
    static, quantized = StaticCache(config=config, max_cache_len=20), filled()
    with torch.no_grad():
        tiny_models.shared("llama")(IDS, past_key_values=static)
        state = tiny_models.shared("mamba")(IDS, use_cache=True).cache_params
    quantized.layers[1] = Quantized()
    with stands_on("the layer classes of transformers.cache_utils"):
        assert adapter.row_editing_problem(filled()) is None
        assert adapter.row_editing_problem(filled("mistral")) is None
        assert "no cache" in str(adapter.row_editing_problem(None))
        assert "put nothing" in str(adapter.row_editing_problem(DynamicCache(config=config)))
        assert "fixed batch size" in str(adapter.row_editing_problem(static))
        assert "quantized" in str(adapter.row_editing_problem(quantized))
        assert "recurrent" in str(adapter.row_editing_problem(state))


@torch.no_grad()
def test_CacheRewind() -> None:
    with stands_on("Cache.activate_past_recording and Cache.crop of sliding layers"):
        model = tiny_models.shared("mistral")
        cache, expected = filled("mistral"), filled("mistral")
        assert any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)
        rewind = adapter.CacheRewind(cache, needed=True)
        for last in (False, True):
            model(IDS[:, :1], past_key_values=cache)
            rewind.step(last=last)
        rewind.finish()
        model(IDS[:, :1], past_key_values=expected)
        assert cache.get_seq_length() == expected.get_seq_length() == IDS.shape[1] + 1
        for layer, other in zip(cache.layers, expected.layers, strict=True):
            assert layer.keys.shape == other.keys.shape
            assert (layer.keys - other.keys).abs().max() < 1e-6
            assert layer.record_past is False


def test_default_generation_values() -> None:
    with stands_on("GenerationConfig._get_default_generation_params"):
        values = adapter.default_generation_values()
        assert {"top_k", "temperature", "num_beams", "do_sample"} <= set(values), sorted(values)


def test_register_model_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    class CanaryConfig(PretrainedConfig):
        model_type = "canary"

    with stands_on("_LazyAutoMapping behind the Auto classes"):
        mapping = AutoModelForCausalLM._model_mapping
        for name in ("_config_mapping", "_reverse_config_mapping", "_model_mapping", "_modules"):
            monkeypatch.setattr(mapping, name, dict(getattr(mapping, name)))
        adapter.register_model_lazily(AutoModelForCausalLM, CanaryConfig, "transformers:LlamaForCausalLM")
        assert mapping[CanaryConfig] is LlamaForCausalLM


def test_remote_code_imports(tmp_path: Path) -> None:
    file = tmp_path / "modeling_x.py"
    file.write_text("import torch\nfrom .configuration_x import C\ntry:\n    import triton\nexcept ImportError: ...\n")
    with stands_on("get_imports and get_relative_imports of transformers.dynamic_module_utils"):
        assert adapter.remote_code_imports(file) == ({"configuration_x"}, {"torch"})


def test_checkpoint_activations() -> None:
    model = tiny_models.build("llama")
    with stands_on("activation_checkpointing_enable, once gradient_checkpointing_enable"):
        adapter.checkpoint_activations(model, use_reentrant=False)
        assert model.is_gradient_checkpointing


def test_use_full_layers() -> None:
    with stands_on("DynamicSlidingWindowLayer of transformers.cache_utils"):
        cache = DynamicCache(config=tiny_models.shared("mistral").config)
        adapter.use_full_layers(cache)
        with torch.no_grad():
            tiny_models.shared("mistral")(IDS, past_key_values=cache)
        assert {layer.keys.shape[-2] for layer in cache.layers} == {IDS.shape[1]}, "columns beyond the window are gone"


def test_column_editing_problem() -> None:
    with stands_on("DynamicLayer of transformers.cache_utils"):
        assert adapter.column_editing_problem(filled()) is None
        assert "no cache" in str(adapter.column_editing_problem(None))
        assert "SlidingWindow" in str(adapter.column_editing_problem(filled("mistral")))
        assert "encoder-decoder" in str(adapter.column_editing_problem(EncoderDecoderCache(filled(), filled())))


def test_rearrange_cache() -> None:
    with stands_on("keys and values of DynamicLayer, (rows, heads, columns, width)"):
        cache, before = filled(), filled().layers[0].keys
        adapter.rearrange_cache(cache, torch.tensor([2, 0]), torch.tensor([0, 3]), trim=1)
        keys = cache.layers[0].keys
        assert torch.equal(keys[0], before[2][:, 1:])
        assert torch.equal(keys[1], before[0].roll(3, dims=1)[:, 1:])


def test_copy_columns() -> None:
    with stands_on("keys and values of DynamicLayer, (rows, heads, columns, width)"):
        cache = filled()
        copies = adapter.copy_columns(cache, 1, 2, 5)
        assert len(copies) == len(cache.layers)
        assert torch.equal(copies[1][1], cache.layers[1].values[1, :, 2:5])


def test_refill_cache() -> None:
    with stands_on("keys and values of DynamicLayer, (rows, heads, columns, width)"):
        cache, before = filled(), filled()
        adapter.refill_cache(
            cache, [adapter.copy_columns(cache, 2, 0, 4), adapter.copy_columns(cache, 0, 0, 6)], [2, 0]
        )
        for layer, old in zip(cache.layers, before.layers, strict=True):
            assert torch.equal(layer.keys[0, :, 2:], old.keys[2, :, :4])
            assert not layer.keys[0, :, :2].any()
            assert torch.equal(layer.values[1], old.values[0, :, :6])


def test_ignores_row_number() -> None:
    with stands_on("the classes of transformers.generation.logits_process and stopping_criteria"):
        from transformers.generation import logits_process, stopping_criteria

        known = {**vars(logits_process), **vars(stopping_criteria)}
        missing = [name for name in adapter._ROW_BLIND if name not in known]
        assert not missing, f"{missing} are gone"
        assert adapter.ignores_row_number(logits_process.TemperatureLogitsWarper(0.5))
        assert not adapter.ignores_row_number(PrefixConstrainedLogitsProcessor(lambda row, ids: [1], 1))


def test_keeps_row_state() -> None:
    with stands_on("the stateful processors of transformers.generation.logits_process"):
        from transformers.generation import logits_process

        missing = [name for name in adapter._ROW_STATE if not hasattr(logits_process, name)]
        assert not missing, f"{missing} are gone"
        assert not adapter.keeps_row_state(RepetitionPenaltyLogitsProcessor(1.2))


def test_prefix_function() -> None:
    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [row]

    with stands_on("PrefixConstrainedLogitsProcessor._prefix_allowed_tokens_fn"):
        assert adapter.prefix_function(PrefixConstrainedLogitsProcessor(allowed, 1)) is allowed
        assert adapter.prefix_function(RepetitionPenaltyLogitsProcessor(1.2)) is None


# Nobody else

#: Private by name, but what transformers asks authors of models to set and to read; and one that this package asks for.
MODEL_AUTHORS = {"_attn_implementation", "_auto_class", "_can_compile_fullgraph", "_init_weights", "_no_split_modules"}
MODEL_AUTHORS |= {"_extrapolates_length", "_is_stateful"}
#: Of Triton: `hf_ext/kernels/aot.py` compiles for GPUs that are not there, and its tests fail where this moves.
TRITONS = {"_pack_args"}
TORCHES = {*dir(torch.Tensor), *dir(torch.nn.Module()), *dir(torch)}
FOLDERS = ("hf_ext", "generation", "modeling", "trainer_callbacks", "claims", "benchmarks")


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """Names that a module defines itself: functions, classes, variables, attributes of `self` and `cls`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner = node.value
            found |= {node.attr} if isinstance(owner, ast.Name) and owner.id in ("self", "cls") else set()
    return found


def private_uses(tree: ast.AST, own: set[str]) -> list[str]:
    """Uses of private names that are neither the package's own nor torch's."""
    found = []

    def note(node: ast.expr | ast.stmt, name: str) -> None:
        authors = name in MODEL_AUTHORS or name in TRITONS or name.startswith("_supports_")
        if private(name) and name not in own and name not in TORCHES and not authors:
            found.append(f"line {node.lineno}: {name}")

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            note(node, node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            if node.func.id in ("getattr", "setattr", "hasattr") and isinstance(node.args[1], ast.Constant):
                note(node, str(node.args[1].value))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
            for name in [*(node.module or "").split("."), *(alias.name for alias in node.names)]:
                if private(name):
                    found.append(f"line {node.lineno}: {name}")
    return found


def test_no_other_module_touches_private_parts_of_transformers() -> None:
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "hf_ext" / "adapter.py"
    }
    assert len(trees) > 30
    own = set().union(*(own_names(tree) for tree in trees.values()))
    found = {str(path.relative_to(ROOT)): uses for path, tree in trees.items() if (uses := private_uses(tree, own))}
    assert not found, f"move these into a function of hf_ext/adapter.py, with a canary: {found}"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("model._prefill(ids)", ["_prefill"]),
        ("getattr(config, '_mask_length', None)", ["_mask_length"]),
        ("model._sample = None", ["_sample"]),
        ("from transformers.utils import _LazyModule", ["_LazyModule"]),
        ("class A:\n    def _own(self): self._own()", []),
        ("x = module._forward_hooks, tensor._version, config._attn_implementation, model._supports_sdpa", []),
    ],
)
def test_the_scan_tells_private_parts_of_transformers_from_others(source: str, names: list[str]) -> None:
    tree = ast.parse(source)
    assert [use.split(": ")[1] for use in private_uses(tree, own_names(tree))] == names


def test_attention_implementation() -> None:
    with stands_on("config._attn_implementation"):
        model = tiny_models.build("llama")
        model.set_attn_implementation("eager")
        assert adapter.attention_implementation(model) == "eager"
        assert adapter.attention_implementation(tiny_models.build("gemma3")) == "sdpa"


def test_cache_layer_base() -> None:
    with stands_on("transformers.cache_utils.CacheLayerMixin"):
        base = adapter.cache_layer_base()
        assert all(isinstance(layer, base) for layer in filled("gemma3").layers)
        assert {"update", "lazy_initialization", "get_mask_sizes", "get_seq_length"} <= set(dir(base))


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_empty_cache(kind: str) -> None:
    with stands_on("DynamicCache(config=...)"):
        ours, made = adapter.empty_cache(tiny_models.shared(kind)), filled(kind)
        assert [type(layer) for layer in ours.layers] == [type(layer) for layer in made.layers]
        assert ours.get_seq_length() == 0


def test_row_addressing_problem() -> None:
    with stands_on("the layers of transformers.cache_utils"):
        for kind in tiny_models.DECODERS:
            assert adapter.row_addressing_problem(filled(kind)) is None
        static = StaticCache(config=tiny_models.shared("gemma3").config, max_cache_len=32)
        assert adapter.row_addressing_problem(static) is None
        assert "recurrent" in str(adapter.row_addressing_problem(adapter.empty_cache(tiny_models.shared("mamba"))))
        assert "encoder-decoder" in str(
            adapter.row_addressing_problem(EncoderDecoderCache(DynamicCache(), DynamicCache()))
        )
        assert "offloaded" in str(adapter.row_addressing_problem(DynamicCache(offloading=True)))
        assert "no cache" in str(adapter.row_addressing_problem(None))


def test_layer_window() -> None:
    with stands_on("the windows of cache layers"):
        cache = filled("gemma3")
        assert [adapter.layer_window(layer) for layer in cache.layers] == [tiny_models.WINDOW, None]
        static = StaticCache(config=tiny_models.shared("gemma3").config, max_cache_len=32)
        assert [adapter.layer_window(layer) for layer in static.layers] == [tiny_models.WINDOW, None]


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_layer_tensors(static: bool) -> None:
    model = tiny_models.shared("gemma3")
    with stands_on("keys, values and lengths of cache layers"):
        cache = StaticCache(config=model.config, max_cache_len=32) if static else adapter.empty_cache(model)
        assert adapter.layer_tensors(cache.layers[0]) is None
        model(IDS, past_key_values=cache, use_cache=True)
        windowed, full = (adapter.layer_tensors(layer) for layer in cache.layers)
        assert windowed is not None
        assert full is not None
        assert windowed[0].shape[2] + windowed[2] == full[0].shape[2] == IDS.shape[1]
        assert full[2] == 0


@torch.no_grad()
def test_layer_buffers() -> None:
    model = tiny_models.shared("gemma3")
    with stands_on("the tensors of static layers"):
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(IDS, past_key_values=cache, use_cache=True)
        windowed, full = (adapter.layer_buffers(layer) for layer in cache.layers)
        assert windowed is None
        assert full is not None
        assert full[0].shape[2] == 32
        assert adapter.layer_buffers(filled().layers[0]) is None


def test_layer_grows() -> None:
    model = tiny_models.shared("gemma3")
    with stands_on("the class of static layers"):
        static = StaticCache(config=model.config, max_cache_len=32)
        assert not any(map(adapter.layer_grows, static.layers))
        assert all(map(adapter.layer_grows, adapter.empty_cache(model).layers))


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_refill_layer(kind: str, static: bool) -> None:
    model = tiny_models.shared(kind)

    def read(*parts: torch.Tensor) -> tuple[Any, torch.Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=32) if static else adapter.empty_cache(model)
        for part in parts:
            logits = model(part, past_key_values=cache, use_cache=True).logits
        return cache, logits[:, -1]

    with stands_on("how layers of a cache hold their tensors"):
        ids = IDS[:1]
        _, expected = read(ids[:, :-1], ids[:, -1:])
        source, _ = read(ids[:, :-1])
        other, _ = read(ids[:, :3])
        for layer, old in zip(other.layers, source.layers, strict=True):
            held = adapter.layer_tensors(old)
            assert held is not None
            adapter.refill_layer(layer, held[0].clone(), held[1].clone(), held[2])
        found = model(ids[:, -1:], past_key_values=other, use_cache=True).logits[:, -1]
        assert (found - expected).abs().max() < 1e-5
        if static and kind == "llama":
            with pytest.raises(ValueError, match="static cache has 32"):
                adapter.refill_layer(other.layers[0], torch.zeros(1, 2, 40, 8), torch.zeros(1, 2, 40, 8), 0)


def test_release_layer() -> None:
    with stands_on("the tensors of dynamic layers"):
        for layer in filled("gemma3").layers:
            adapter.release_layer(layer)
            assert adapter.layer_tensors(layer) is None


def test_ignores_ids() -> None:
    from transformers import MinNewTokensLengthLogitsProcessor, TemperatureLogitsWarper

    with stands_on("the names of logits processors"):
        for name in adapter._IDS_BLIND:
            assert hasattr(transformers.generation.logits_process, name), name
        assert adapter.ignores_ids(TemperatureLogitsWarper(0.5))
        assert not adapter.ignores_ids(RepetitionPenaltyLogitsProcessor(1.5))
        assert not adapter.ignores_ids(MinNewTokensLengthLogitsProcessor(1, 1, 1))


def test_is_loaded(tmp_path: Path) -> None:
    with stands_on("_is_hf_initialized"):
        seen: list[bool] = []

        class Watched(LlamaForCausalLM):
            def _init_weights(self, module: Any) -> None:
                if isinstance(module, torch.nn.Linear):
                    seen.append(adapter.is_loaded(module))
                super()._init_weights(module)

        config = tiny_models.shared("llama").config
        Watched(config).save_pretrained(tmp_path)
        assert seen, "the weights of a new model were not drawn through _init_weights"
        assert not any(seen)
        fresh = torch.nn.Linear(2, 2)
        assert not adapter.is_loaded(fresh)
        fresh._is_hf_initialized = True  # type: ignore[assignment]
        assert adapter.is_loaded(fresh)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_attention_configs(kind: str) -> None:
    with stands_on("the configs that attention modules look into"):
        model = tiny_models.build(kind)
        [config] = adapter.attention_configs(model)
        layers = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "config")]
        assert len(layers) >= 2
        assert all(layer.config is config for layer in layers)
    with pytest.raises(ValueError, match="OpenAIGPT"):
        adapter.attention_configs(tiny_models.shared("openai-gpt"))


def test_attention_of() -> None:
    with stands_on("_attn_implementation"):
        for name in ("sdpa", "eager"):
            assert adapter.attention_of(tiny_models.build("llama", attn_implementation=name).config) == name


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_switch_attention(kind: str) -> None:
    with stands_on("_attn_implementation_internal, looked up by every attention layer"):
        model, calls = tiny_models.build(kind), []

        def spy(module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return adapter.attention_function("sdpa", module)(module, *args, **kwargs)

        adapter.register_attention_like("canary_of_the_adapter", spy, "sdpa")
        expected = model(IDS).logits
        adapter.switch_attention(model.config, "canary_of_the_adapter")
        assert torch.equal(model(IDS).logits, expected)
        assert len(calls) == 2, f"{kind}: {len(calls)} of 2 layers asked for the attention that its config names"
        adapter.switch_attention(model.config, "eager")
        assert (model(IDS).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_attention_function(kind: str) -> None:
    with stands_on("AttentionInterface, and eager_attention_forward beside the attention modules"):
        layer = next(module for module in tiny_models.shared(kind).modules() if hasattr(module, "layer_idx"))
        assert adapter.attention_function("eager", layer).__name__ == "eager_attention_forward"
        assert adapter.attention_function("sdpa", layer).__name__ == "sdpa_attention_forward"
    with pytest.raises(ValueError, match="found no eager"):
        adapter.attention_function("eager", torch.nn.Linear(1, 1))


def test_register_attention_like() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    with stands_on("AttentionInterface.register and AttentionMaskInterface.register"):

        def attend(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError

        for own in ("sdpa", "eager"):
            adapter.register_attention_like(f"canary_like_{own}", attend, own)
            assert AttentionInterface()[f"canary_like_{own}"] is attend
            assert AttentionMaskInterface()[f"canary_like_{own}"] is AttentionMaskInterface()[own]


def test_attention_mappings() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    with stands_on("_global_mapping of both interfaces"):
        attentions, masks = adapter.attention_mappings()
        assert AttentionInterface()["sdpa"] is attentions["sdpa"]
        assert AttentionMaskInterface()["sdpa"] is masks["sdpa"]
        AttentionInterface.register("canary_mapping", attentions["sdpa"])
        assert attentions.pop("canary_mapping") is attentions["sdpa"]
        assert "canary_mapping" not in AttentionInterface()


def test_attends_by_code_of_its_own() -> None:
    import transformers.models.bloom.modeling_bloom
    import transformers.models.llama.modeling_llama

    with stands_on("config_class and _can_set_attn_implementation"):
        assert adapter.attends_by_code_of_its_own(transformers.BloomConfig)
        assert not adapter.attends_by_code_of_its_own(transformers.LlamaConfig)
        # Of what is not known, nothing is said: no model, or one whose source cannot be read.
        unknown = type("Unknown", (transformers.LlamaConfig,), {})
        assert not adapter.attends_by_code_of_its_own(unknown)
        pieces = {"config_class": unknown, "__module__": "written_nowhere"}
        model = type("FromANotebook", (transformers.PreTrainedModel,), pieces)
        adapter.attends_by_code_of_its_own.cache_clear()
        assert model.config_class is unknown
        assert not adapter.attends_by_code_of_its_own(unknown)


def test_sdpa_function() -> None:
    from transformers import AttentionInterface

    with stands_on("sdpa_attention_forward"):
        assert adapter.sdpa_function() is AttentionInterface()["sdpa"]


def test_sdpa_attention() -> None:
    with stands_on("sdpa_attention_forward"):
        from transformers import AttentionInterface

        module = torch.nn.Linear(1, 1)
        parts = [torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        found, weights = adapter.sdpa_attention(module, *parts, None, dropout=0.0, scaling=0.5, is_causal=True)
        assert torch.equal(found, AttentionInterface()["sdpa"](module, *parts, None, scaling=0.5, is_causal=True)[0])
        assert weights is None
        expected = torch.nn.functional.scaled_dot_product_attention(*parts, scale=0.5, is_causal=True).transpose(1, 2)
        assert torch.equal(found, expected)


def test_sdpa_mask() -> None:
    from transformers.masking_utils import causal_mask_function

    with stands_on("sdpa_mask"):
        some = torch.tensor([[False, True, True]])
        given = {"batch_size": 1, "q_length": 2, "kv_length": 3, "q_offset": 1, "attention_mask": some}
        found = adapter.sdpa_mask(**given, mask_function=causal_mask_function)
        assert found is not None
        assert found.tolist() == [[[[False, True, False], [False, True, True]]]]


def test_mask_is_needless() -> None:
    with stands_on("the conditions under which sdpa_mask returns None"):
        some = torch.tensor([[False, True, True, True]])
        skips = {"allow_is_causal_skip": True, "allow_is_bidirectional_skip": False}
        both = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
        outcomes = set()
        for allowed in (skips, both):
            for queries, keys, offset in ((4, 4, 0), (1, 4, 3), (2, 4, 2), (2, 4, 0)):
                for padding in (None, some, torch.ones_like(some), torch.tensor([[True, True, False, False]])):
                    for local in (None, 3, 9):
                        given = {"q_length": queries, "kv_length": keys, "q_offset": offset, "kv_offset": 0}
                        needless = adapter.mask_is_needless(
                            **given, attention_mask=padding, local_size=local, **allowed
                        )  # fmt: skip
                        built = adapter.sdpa_mask(
                            batch_size=1, **given, attention_mask=padding, local_size=local, **allowed
                        )  # fmt: skip
                        assert bool(needless) == (built is None), (given, padding, local, allowed)
                        outcomes.add(bool(needless))
        assert outcomes == {False, True}


def test_describe_mask_function() -> None:
    from transformers import masking_utils as made

    left, ids = torch.tensor([1]), torch.tensor([[0, 0, 1, 1]])
    with stands_on("the closures of masking_utils"):
        causal = made.causal_mask_function
        described = {
            "causal": (causal, [("causal",)]),
            "everything": (made.bidirectional_mask_function, [("everything",)]),
            "window": (made.sliding_window_causal_mask_function(3), [("window", 3), ("causal",)]),
            "near": (made.sliding_window_bidirectional_mask_function(3), [("near", 3), ("everything",)]),
            "chunks": (made.chunked_causal_mask_function(2, left), [("chunks", 2, left), ("causal",)]),
            "padding": (made.and_masks(causal, made.padding_mask_function(ids)), [("causal",), ("padding", ids)]),
            "sequences": (made.packed_sequence_mask_function(ids), [("sequences", ids)]),
            "any": (made.or_masks(causal, made.packed_sequence_mask_function(ids)),
                    [("any", [("causal",)], [("sequences", ids)])]),
        }  # fmt: skip
        if hasattr(made, "blockwise_overlay"):  # after transformers 5.17
            blocks = made.or_masks(causal, made.blockwise_overlay(ids))
            described["blocks"] = (blocks, [("any", [("causal",)], [("blocks", ids)])])
        if hasattr(made, "packed_sequence_compatibility_function"):
            packed = made.packed_sequence_compatibility_function(causal, left, ids)
            described["renumbered"] = (packed, [("sequences", ids), ("renumbered", left, [("causal",)])])
        for name, (function, expected) in described.items():
            assert adapter.describe_mask_function(function) == expected, name

        def mine(row: int, head: int, query: int, key: int) -> bool:
            return key <= query

        for unknown in (mine, lambda *_: True, made.and_masks(causal, mine), made.or_masks(mine, causal)):
            assert adapter.describe_mask_function(unknown) is None
        # What the parts mean is held against the masks themselves in tests/attention/test_described.py.


def test_masks_like() -> None:
    with stands_on("mask functions by name"):
        adapter.register_attention_like("canary_of_masks", adapter.sdpa_attention, "sdpa")
        assert adapter.masks_like("canary_of_masks", ["eager", "sdpa"]) == "sdpa"
        assert adapter.masks_like("no_such_attention", ["eager", "sdpa"]) is None


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_first_inputs(kind: str) -> None:
    model = tiny_models.shared(kind)
    with stands_on("is_first_iteration of prepare_inputs_for_generation"):
        _, kwargs = prepared(kind)
        ours = model(**adapter.first_inputs(model, IDS, {**kwargs, "attention_mask": MASK})).logits[:, -1]
        expected = model.generate(
            IDS, attention_mask=MASK, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        worst = (ours - expected.logits[0]).abs().max().item()
        assert worst < 1e-4, f"the largest difference of a logit from those of generate is {worst:.3g}"


def test_states_of() -> None:
    with stands_on("transformers.generation.utils.ALL_CACHE_NAMES"):
        for kind, name in (("llama", "past_key_values"), ("mamba", "cache_params")):
            model = tiny_models.shared(kind)
            kwargs = adapter.extend_kwargs(model, model(IDS, use_cache=True), {"past_key_values": None, "x": 1})
            [state] = adapter.states_of(kwargs)
            assert state is kwargs[name]
        assert adapter.states_of({"attention_mask": MASK}) == []


def test_is_user_state() -> None:
    with stands_on("what generate makes and marks"):
        for kind in ("llama", "mamba"):
            [state] = adapter.states_of(prepared(kind)[1])
            assert not adapter.is_user_state(state)
        given = adapter.empty_cache(tiny_models.shared("mamba"))
        [state] = adapter.states_of(prepared("mamba", cache_params=given)[1])
        assert state is given
        assert adapter.is_user_state(state)
        assert adapter.is_user_state([torch.zeros(1)]), "the state of a model that has no Cache"
        assert not adapter.is_user_state(None)


def test_cached_tokens() -> None:
    with stands_on("get_seq_length of caches"):
        assert adapter.cached_tokens(None) == 0
        assert adapter.cached_tokens(DynamicCache()) == 0
        assert adapter.cached_tokens(EncoderDecoderCache(DynamicCache(), DynamicCache())) == 0
        assert adapter.cached_tokens(filled("llama")) == filled("llama").get_seq_length() > 0
        model = tiny_models.shared("mamba")
        assert adapter.cached_tokens(model(IDS, use_cache=True).cache_params) == 0
        with pytest.raises(ValueError, match="get_seq_length"):
            model(IDS, use_cache=True).cache_params.get_seq_length()


def test_compression_problem():
    config = tiny_models.shared("gemma3").config
    assert adapter.compression_problem(DynamicCache(config=config).layers) is None
    assert "StaticLayer" in adapter.compression_problem([StaticLayer(8)])
    assert "how many layers" in adapter.compression_problem([])
    recurrent = DynamicCache(config=tiny_models.shared("mamba").config).layers
    assert "LinearAttention" in adapter.compression_problem(recurrent)


def test_eviction_problem():
    import transformers.models.bloom.modeling_bloom
    import transformers.models.falcon.modeling_falcon

    with stands_on("rope_parameters, alibi and relative_attention_num_buckets of configurations"):
        assert "learned" in adapter.eviction_problem(tiny_models.shared("t5").config)
        assert "ALiBi" in adapter.eviction_problem(transformers.BloomConfig())
        assert adapter.eviction_problem(transformers.FalconConfig(alibi=True)) is not None
        assert adapter.eviction_problem(transformers.FalconConfig(alibi=False)) is None
        assert adapter.eviction_problem(tiny_models.shared("opt").config) is None


def test_is_empty_layer():
    layers = DynamicCache(config=tiny_models.shared("llama").config).layers
    assert not any(map(adapter.is_empty_layer, layers))


def test_tensors_of_layer():
    layer = DynamicLayer()
    assert adapter.tensors_of_layer(layer) == []
    layer.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5))
    assert [tensor.shape[-1] for tensor in adapter.tensors_of_layer(layer)] == [4, 5]


def test_recomputing_under() -> None:
    with stands_on("_gradient_checkpointing_func of checkpointed layers"):
        model, entered = tiny_models.build("llama").train(), []

        @contextlib.contextmanager
        def noted() -> Iterator[None]:
            entered.append(True)
            yield

        adapter.checkpoint_activations(model, use_reentrant=False)
        with adapter.recomputing_under(model, noted):
            loss = model(IDS, attention_mask=MASK).logits.sum()
        assert not entered, "the first pass is not a recomputation"
        other = model(IDS, attention_mask=MASK).logits.sum()
        loss.backward()
        assert len(entered) == 2, f"{len(entered)} of 2 layers were recomputed in the context"
        other.backward()
        assert len(entered) == 2, "a pass outside of the block was recomputed in the context"


def test_prepared_inputs(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(tiny_models.build("llama"), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    given = {"input_ids": IDS}
    with stands_on("Trainer._prepare_inputs"):
        found = adapter.prepared_inputs(trainer, given)
        assert torch.equal(found["input_ids"], IDS)
        assert found is not given


def test_position_table() -> None:
    with stands_on("inv_freq buffers, and make_weights of tables that grow"):
        found = {kind: adapter.position_table(tiny_models.shared(kind)) for kind in tiny_models.DECODERS}
        assert found == {"gpt2": 128, "opt": 128, "llama": None, "qwen3": None, "mistral": None, "gemma3": None}
        from transformers import XGLMConfig, XGLMForCausalLM

        shape = {"d_model": 16, "ffn_dim": 16, "num_layers": 1, "attention_heads": 2, "vocab_size": 16}
        assert adapter.position_table(XGLMForCausalLM(XGLMConfig(**shape, max_position_embeddings=9))) is None


def test_rotation_switch() -> None:
    with stands_on("rope_type and lengths of the modules that compute rotations"):
        assert all(adapter.rotation_switch(tiny_models.shared(kind)) is None for kind in tiny_models.DECODERS)
        dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        model = tiny_models.build("llama", max_position_embeddings=20, rope_parameters=dynamic)
        assert adapter.rotation_switch(model) == ("dynamic", 20)
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        long = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors}
        assert adapter.rotation_switch(tiny_models.build("llama", rope_parameters=long)) == ("longrope", 16)


def test_calling_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Asking(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.found = adapter.calling_trainer(self)

    with stands_on("Trainer.callback_handler, and callbacks being called below Trainer's methods"):
        asking = Asking()
        arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
        rows = [{"input_ids": IDS[0], "labels": IDS[0]}]
        trainer = Trainer(tiny_models.build("llama"), arguments, train_dataset=rows, callbacks=[asking])
        assert adapter.calling_trainer(asking) is None
        trainer.train()
        assert asking.found is trainer


def test_has_causal_loss() -> None:
    with stands_on("PreTrainedModel.loss_function, _loss_function, and LOSS_MAPPING"):
        model = tiny_models.build("llama")
        assert adapter.has_causal_loss(model)
        model.loss_function = lambda *args, **kwargs: None
        assert not adapter.has_causal_loss(model)
        del model._loss_function
        assert adapter.has_causal_loss(model)


def test_give_loss_back() -> None:
    with stands_on("PreTrainedModel.loss_function and _loss_function"):
        model = tiny_models.build("llama")
        before, mine = model.loss_function, lambda *args, **kwargs: None
        model.loss_function = mine
        adapter.give_loss_back(model, instead=print)
        assert model.loss_function is mine
        adapter.give_loss_back(model, instead=mine)
        adapter.give_loss_back(model, instead=mine)
        assert model.loss_function is before

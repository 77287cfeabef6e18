"""The cache from outside: other attention implementations, turns, files, memory, and what it refuses."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedModel

from hf_ext.cache import H2O, KIVI, AdaKV, CompressedCache, Knorm, StreamingLLM
from hf_ext.testing import tiny_models
from hf_ext.testing.cache_base import Script, passes

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def model_of(kind: str = "llama", implementation: str = "hf_ext", **changes):
    model = tiny_models.build(kind, **changes)
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3", "qwen3"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_gives_the_same_in_a_padded_batch(kind, implementation):
    ids, mask = tiny_models.prompts((24, 19))
    script = Script(
        tiny_models.build(kind), Knorm(budget=6), mask, implementation, attention_mask=mask[:, :9]
    )  # fmt: skip
    for part in passes(24, (9, 1, 1, 6, 1, 1, 5)):
        script.step(ids[:, part], mask[:, : part.stop])
    assert max(script.compressed.held()) == 6


def test_other_attention_gives_the_same_text_under_beams():
    ids, _ = tiny_models.prompts((14,))
    texts = []
    for implementation in ("sdpa", "hf_ext"):
        model = model_of(implementation=implementation)
        cache = CompressedCache(model.config, Knorm(budget=6))
        texts.append(model.generate(ids, past_key_values=cache, num_beams=3, **GREEDY).tolist())
    assert texts[0] == texts[1]


def test_a_batch_whose_padding_is_unknown_is_refused():
    ids, mask = tiny_models.prompts((14, 9))
    model = model_of(implementation="sdpa")
    for options, message in (
        ({}, r"which tokens of a batch are padding.*attention_mask="),
        ({"attention_mask": mask}, "give the budget in tokens"),
    ):
        cache = CompressedCache(model.config, Knorm(budget=0.5), **options)
        with pytest.raises(ValueError, match=message):
            model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)


def test_layers_may_have_budgets_of_their_own():
    model = model_of()
    cache = CompressedCache(model.config, Knorm(), layer_budgets=[5, 0.5])
    model(torch.arange(1, 21)[None], past_key_values=cache)
    assert cache.held() == [5, 10]
    cache = CompressedCache(model.config, Knorm(budget=5), skip_layers=1)
    model(torch.arange(1, 21)[None], past_key_values=cache)
    assert cache.held() == [5]
    assert cache.layers[0].get_seq_length() == 20


def test_generate_goes_on_after_a_turn():
    """The second turn is given the whole text, as chat templates give it, and feeds only what is new."""
    model = model_of()
    ids, _ = tiny_models.prompts((12,))
    cache = CompressedCache(model.config, StreamingLLM(budget=8, sinks=2))
    first = model.generate(ids, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 17
    text = torch.cat([first, tiny_models.prompts((5,), seed=1)[0]], dim=1)
    second, calls = tiny_models.calls_of(model, lambda: model.generate(text, past_key_values=cache, **GREEDY))
    assert second.shape == (1, 29)
    assert calls[0] == (1, 6), calls
    assert cache.columns(0)[0, 0].tolist() == [0, 1, *range(22, 28)]


@pytest.mark.parametrize("assistant", [None, 1])
def test_assisted_decoding_forgets_what_was_rejected(assistant):
    """What is held is dropped after each step, once it is known which tokens stay."""
    model = model_of()
    more = {"prompt_lookup_num_tokens": 3}
    if assistant:
        more = {"assistant_model": model_of(num_hidden_layers=assistant)}
    ids, _ = tiny_models.prompts((20,))
    cache = CompressedCache(model.config, StreamingLLM(budget=12, sinks=2, interval=1))
    found = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=8, **more)
    assert found.shape == (1, 28)
    assert cache.get_seq_length() == 27
    assert cache.columns(0)[0, 1].tolist() == [0, 1, *range(17, 27)]
    full = CompressedCache(model.config, StreamingLLM(budget=1.0))
    plain = model.generate(ids, do_sample=False, max_new_tokens=8)
    found = model.generate(ids, past_key_values=full, do_sample=False, max_new_tokens=8, **more)
    assert found.tolist() == plain.tolist()


def test_a_saved_prompt_is_gone_on_with(tmp_path):
    ids, mask = tiny_models.prompts((16, 11))
    for kind, policy in (("llama", Knorm(budget=6)), ("gemma3", StreamingLLM(budget=0.5, sinks=2))):
        model = model_of(kind)
        cache = CompressedCache(model.config, policy)
        with torch.no_grad():
            where = (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1]
            model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=where, past_key_values=cache)
        cache.save(tmp_path / "prompt.safetensors")
        again = CompressedCache.load(tmp_path / "prompt.safetensors", model.config)
        assert again.policy == policy
        assert again.resident_bytes() <= cache.resident_bytes()
        assert again.nominal_bytes() == cache.nominal_bytes()
        texts = [model.generate(ids, attention_mask=mask, past_key_values=c, **GREEDY).tolist() for c in (cache, again)]
        assert texts[0] == texts[1]
    cache = CompressedCache(model.config, Knorm(budget=5, when="prefill"))
    model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    cache.save(tmp_path / "prompt.safetensors")
    again = CompressedCache.load(tmp_path / "prompt.safetensors", model.config)
    assert again.nominal_bytes() == cache.nominal_bytes(), "what was decoded since is part of the budget"
    with safe_open(tmp_path / "prompt.safetensors", framework="pt") as file:
        old = {**file.metadata(), "format": "hf_ext compressed cache 1"}
        save_file({name: file.get_tensor(name) for name in file.keys()}, tmp_path / "old.safetensors", metadata=old)  # noqa: SIM118
    with pytest.raises(ValueError, match="has the layout 'hf_ext compressed cache 1', this version of hf_ext reads"):
        CompressedCache.load(tmp_path / "old.safetensors", model.config)
    with pytest.raises(ValueError, match="this one has"):
        CompressedCache.load(tmp_path / "prompt.safetensors", model_of("llama").config)
    with pytest.raises(ValueError, match="cache is empty"):
        CompressedCache(model.config, policy).save(tmp_path / "none.safetensors")


def test_a_copy_is_a_cache_of_its_own():
    """One compressed prompt serves several questions."""
    model = model_of()
    ids, _ = tiny_models.prompts((12,))
    cache = CompressedCache(model.config, Knorm(budget=6))
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    texts = [model.generate(ids, past_key_values=copy.deepcopy(cache), **GREEDY).tolist() for _ in range(2)]
    assert texts[0] == texts[1]
    assert cache.get_seq_length() == 11


def test_dropped_memory_is_free_before_the_next_layer_runs():
    """No layer's full keys outlive its attention: at the end only what is kept is alive."""
    model = model_of(num_hidden_layers=3)
    ids, _ = tiny_models.prompts((100,))
    cache = CompressedCache(model.config, Knorm(budget=10))
    width = model.config.hidden_size // model.config.num_attention_heads
    full = []

    def note(module, args, output):
        gc.collect()
        alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (1, 2, 100, width)]
        full.append(len(alive))

    handles = [layer.mlp.register_forward_hook(note) for layer in model.model.layers]
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for handle in handles:
        handle.remove()
    assert full == [0, 0, 0], full


def test_offloading_moves_all_that_is_held():
    model = model_of()
    cache = CompressedCache(model.config, Knorm(budget=6))
    model(torch.arange(1, 13)[None], past_key_values=cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert all(tensor.device.type == "cpu" for tensor in cache._tensors())


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["hf_ext", "sdpa"])
def test_a_layer_is_offloaded_after_its_attention(implementation, monkeypatch):
    """Transformers offloads at the end of `update`, before the attention of "hf_ext" has read what is held."""
    model = model_of(implementation=implementation)
    cache = CompressedCache(model.config, Knorm(budget=6))
    update, held = CompressedCache.update, []

    def offloading(self, key, value, layer, *args, **kwargs):
        found = update(self, key, value, layer, *args, **kwargs)
        self.layers[layer].offload()
        return found

    monkeypatch.setattr(CompressedCache, "update", offloading)
    for layer in cache.layers:
        monkeypatch.setattr(
            layer.store,
            "to",
            lambda device, store=layer.store: held.append((str(device), len(store.buffers), len(store))),
        )
    with torch.no_grad():
        model(torch.arange(1, 13)[None], past_key_values=cache)
        model(torch.arange(1, 3)[None], past_key_values=cache)
    assert held == [("cpu", 3, 6)] * 4, "what is moved is what is left after the pass"


def test_reset_forgets_everything():
    model = model_of()
    cache = CompressedCache(model.config, Knorm(budget=6))
    ids, _ = tiny_models.prompts((12,))
    first = model.generate(ids, past_key_values=cache, **GREEDY)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.resident_bytes() == 0
    assert model.generate(ids, past_key_values=cache, **GREEDY).tolist() == first.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda config: CompressedCache(config, "knorm"), "policy must be a cache policy"),
        (lambda config: CompressedCache(config, Knorm(budget=0)), "at least 1"),
        (lambda config: CompressedCache(config, Knorm(budget=1.5)), "at most 1.0"),
        (lambda config: CompressedCache(config, Knorm(budget=True)), "an int"),
        (lambda config: CompressedCache(config, Knorm(when="never")), "'prefill', 'decode' or 'both'"),
        (lambda config: CompressedCache(config, Knorm(window=-1)), "window must be"),
        (lambda config: CompressedCache(config, Knorm(interval=0)), "interval must be"),
        (lambda config: CompressedCache(config, Knorm(), skip_layers=9), "no layer is left"),
        (lambda config: CompressedCache(config, Knorm(), layer_budgets=[1]), "1 budgets for 2"),
        (lambda config: CompressedCache(config, Knorm(), sliding="maybe"), "'keep' or 'compress'"),
        (lambda _: CompressedCache(tiny_models.shared("mamba").config, Knorm()), "cannot be compressed"),
        (lambda config: CompressedCache(config, Knorm()).columns(0), "the cache is empty"),
    ],
)
def test_wrong_input_gets_a_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_models.shared("llama").config)


def test_what_was_dropped_or_counted_cannot_be_forgotten():
    model = model_of()
    cache = CompressedCache(model.config, Knorm(budget=6))
    model(torch.arange(1, 13)[None], past_key_values=cache)
    with pytest.raises(ValueError, match="some of them were dropped"):
        cache.crop(-8)
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(3)
    cache = CompressedCache(model.config, H2O(budget=6))
    model(torch.arange(1, 13)[None], past_key_values=cache)
    with pytest.raises(ValueError, match="H2O has counted their attention"):
        cache.crop(-1)
    cache = CompressedCache(model.config, Knorm(budget=6, window=3))
    model(torch.arange(1, 13)[None], past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 9


def test_models_that_count_distances_by_entries_are_refused():
    """What is dropped would move the others: silently in BLOOM, GPT-Neo and T5."""
    import transformers

    shape = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    falcon = {**shape, "new_decoder_architecture": False, "multi_query": True}
    ids, _ = tiny_models.prompts((12,))
    for name, settings in (("Bloom", {**shape, "n_layer": 2, "n_head": 4}), ("Falcon", {**falcon, "alibi": True})):
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
        with pytest.raises(ValueError, match=r"cannot be compressed.*ALiBi"):
            model(ids, past_key_values=CompressedCache(model.config, Knorm(budget=6)))
    model = tiny_models.build("t5")
    with pytest.raises(ValueError, match=r"cannot be compressed.*learned position bias"):
        model.generate(ids, past_key_values=CompressedCache(model.config, Knorm(budget=6)), **GREEDY)
    model = tiny_models.fill(transformers.FalconForCausalLM(transformers.FalconConfig(**falcon, alibi=False)))
    cache = CompressedCache(model.config, Knorm(budget=6))
    model(ids, past_key_values=cache)
    assert cache.held() == [6, 6]


def test_caches_of_something_else_than_keys_run_under_other_attention():
    """Multi-head latent attention: exact under sdpa, and refused in words where it has to come back."""
    config = transformers.DeepseekV3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        first_k_dense_replace=2, max_position_embeddings=64,
    )  # fmt: skip
    model = tiny_models.fill(transformers.DeepseekV3ForCausalLM(config))
    ids, mask = tiny_models.prompts((24, 19))
    script = Script(model, StreamingLLM(budget=6, sinks=2), mask, "sdpa", attention_mask=mask[:, :9])
    for part in passes(24, (9, 1, 1, 6, 1, 1, 5)):
        script.step(ids[:, part], mask[:, : part.stop])
    assert script.compressed.held() == [6, 6]
    model.set_attn_implementation("hf_ext")
    cache = CompressedCache(model.config, Knorm(budget=6))
    for run in (lambda: model(ids[:1], past_key_values=cache), lambda: cache.columns(0)):
        with pytest.raises(ValueError, match=r"has not come back.*latent attention does, runs under 'sdpa'"):
            run()


def test_weights_of_uneven_heads_are_refused():
    model = model_of()
    cache = CompressedCache(model.config, AdaKV(policy=Knorm(), budget=6))
    model(torch.arange(1, 13)[None], past_key_values=cache)
    with pytest.raises(ValueError, match=r"no weights to return.*output_attentions"):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache, output_attentions=True)


def test_another_number_of_rows_is_refused():
    model = model_of()
    cache = CompressedCache(model.config, Knorm(budget=6))
    model(torch.arange(1, 13)[None], past_key_values=cache)
    with pytest.raises(ValueError, match="holds 1 rows, the model runs 2"):
        model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)


def test_a_model_with_more_layers_is_refused():
    cache = CompressedCache(tiny_models.build("llama", num_hidden_layers=1).config, Knorm(budget=6))
    with pytest.raises(ValueError, match="a model of 1 layers, and this one has more"):
        tiny_models.shared("llama")(torch.arange(1, 13)[None], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["hf_ext", "sdpa"])
def test_a_cache_that_a_broken_pass_left_behind_is_refused_until_it_is_reset(implementation: str) -> None:
    model, ids = model_of(implementation=implementation), torch.arange(1, 13)[None]
    cache = CompressedCache(model.config, Knorm(budget=6))
    model(ids, past_key_values=cache)
    before, expected = copy.deepcopy(cache), model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    values = model.model.layers[1].self_attn.v_proj
    hook = values.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        model(ids[:, :1], past_key_values=cache)
    hook.remove()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layer 1 has seen 12 tokens.*cache\.reset\(\)"):
            model(ids[:, :1], past_key_values=cache)
    assert torch.equal(model(ids[:, :1], past_key_values=before).logits, expected)
    cache.reset()
    model(ids, past_key_values=cache)
    assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, expected)


def model_that_shares_keys(name: str) -> PreTrainedModel:
    """Return a model whose last two layers read the keys of the two before them."""
    shape = {
        "vocab_size": tiny_models.VOCABULARY, "vocab_size_per_layer_input": tiny_models.VOCABULARY, "hidden_size": 32,
        "hidden_size_per_layer_input": 8, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 8,
        "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "pad_token_id": 0,
        "eos_token_id": None, "bos_token_id": 1,
    }  # fmt: skip
    if name == "Gemma3n":
        shape |= {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4}
        shape["intermediate_size"] = [48] * 4
    else:
        shape |= {"global_head_dim": 16, "use_double_wide_mlp": False}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig")(**shape)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["Gemma3n", "Gemma4"])  # the latter's last layers run for the last queries alone
def test_layers_that_share_keys_attend_to_what_the_layer_they_are_of_attended_to(name: str) -> None:
    model = model_that_shares_keys(name)
    ids, mask = tiny_models.prompts((20, 13))

    def logits(implementation: str, cache: object, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        found = []
        for part in passes(20, (14, 1, 1, 1, 3)):
            given = {"attention_mask": mask[:, : part.stop], "past_key_values": cache, "logits_to_keep": 1}
            found.append(model(ids[:, part], **given).logits[:, -1])
        return torch.cat(found, dim=1)

    expected = logits("eager", DynamicCache(config=model.config), ids, mask)
    for options in ({}, {"sliding": "compress"}):
        for policy in (H2O(budget=1.0), H2O(budget=64), Knorm(budget=1.0)):
            found = logits("hf_ext", CompressedCache(model.config, policy, **options), ids, mask)
            gap = (found - expected).abs().max().item()
            assert gap < 2e-5, f"{policy} {options}: the largest difference is {gap:.2e}"
    # Under another attention the layers read the very tensors; both drop the same.
    one, real = ids[:1], mask[:1]
    dropped = [
        logits(name, CompressedCache(model.config, StreamingLLM(budget=6)), one, real) for name in ("sdpa", "hf_ext")
    ]
    gap = (dropped[0] - dropped[1]).abs().max().item()
    assert gap < 2e-5, f"the largest difference is {gap:.2e}"
    assert (dropped[0] - expected[:1]).abs().max() > 1e-3
    for policy in (AdaKV(policy=Knorm(budget=6)), KIVI(group=4, residual=4)):
        with pytest.raises(ValueError, match="another layer attends to the keys of layer 1"):
            logits("hf_ext", CompressedCache(model.config, policy), ids, mask)


@pytest.mark.parametrize(
    ("policy", "share"), [(Knorm(budget=1.0), 2e-7), (AdaKV(policy=Knorm(budget=1.0)), 3e-6)], ids=["dense", "ragged"]
)
def test_gradients_flow_through_a_first_pass(policy, share):
    """Training with a cache is rare, and not wrong."""
    model = model_of().train()
    ids, _ = tiny_models.prompts((10,))
    grads = []
    for cache in (CompressedCache(model.config, policy), DynamicCache()):
        model.zero_grad()
        model(ids[:, :6], past_key_values=cache)
        model(ids[:, 6:], past_key_values=cache).logits.sum().backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    gap, largest = (grads[0] - grads[1]).abs().max().item(), grads[1].abs().max().item()
    assert gap < share * largest, f"the largest difference is {gap:.2e}, of gradients up to {largest:.2e}"


def test_crop_takes_a_number_in_a_tensor_as_older_transformers_passes_it() -> None:
    model, ids = tiny_models.shared("llama"), tiny_models.prompts()[0][:1]
    found = []
    for count in (-2, torch.tensor(-2)):
        cache = CompressedCache(model.config, Knorm(budget=64))
        with torch.no_grad():
            model(ids, past_key_values=cache)
            cache.crop(count)
            found.append(model(ids[:, -2:], past_key_values=cache).logits)
    difference = float((found[0] - found[1]).abs().max())
    assert difference == 0, f"logits differ by {difference:.3g}"

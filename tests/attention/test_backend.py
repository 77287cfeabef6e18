"""Stock models with `attn_implementation="hf_ext"`: the same logits, tokens and gradients as without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_ext import adapter
from hf_ext.attention import AttentionStructure, backend, kernels, masks_for, pack
from hf_ext.testing import tiny_models

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "opt", "gpt_oss")
#: SDPA knows neither soft-capping nor sinks; there eager attention says what is right.
BEYOND_SDPA = ("gemma2", "gpt_oss")
IDS, MASK = tiny_models.prompts()
REAL = MASK.bool()
#: Neither padding nor what padding predicts: queries that see nothing get what each implementation likes.
LABELS = IDS.masked_fill(~(REAL & REAL.roll(1, 1)), -100)
#: float32; the largest logits are about 10.
CLOSE = 2e-5

Build = Callable[[str], Any]


@contextlib.contextmanager
def attending(model: Any, name: str) -> Iterator[Any]:
    before = adapter.attention_implementation(model)
    model.set_attn_implementation(name)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def logits(model: Any, name: str, **inputs: Any) -> torch.Tensor:
    with attending(model, name), torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_eager_and_bitwise_those_of_sdpa(kind: str, shared: Build) -> None:
    model = shared(kind)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    for given in (inputs, {"input_ids": IDS[:1]}):
        found, expected = logits(model, "hf_ext", **given), logits(model, "eager", **given)
        real = REAL if "attention_mask" in given else REAL[:1]
        difference = float((found - expected)[real].abs().max())
        assert difference < CLOSE, difference
        if kind not in BEYOND_SDPA:
            assert torch.equal(found, logits(model, "sdpa", **given))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_a_model_is_loaded_with_it(kind: str, shared: Build, tmp_path: Path) -> None:
    shared(kind).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hf_ext", dtype=torch.float32).eval()
    assert adapter.attention_implementation(model) == "hf_ext"
    with torch.no_grad():
        found = model(IDS, attention_mask=MASK).logits
    difference = float((found - logits(shared(kind), "eager", input_ids=IDS, attention_mask=MASK))[REAL].abs().max())
    assert difference < CLOSE, difference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_text_of_a_padded_batch_is_the_same(kind: str, cache: str | None, shared: Build) -> None:
    model = shared(kind)
    tokens = []
    for name in ("hf_ext", "eager" if kind in BEYOND_SDPA else "sdpa"):
        with attending(model, name):
            tokens.append(model.generate(
                IDS, attention_mask=MASK, do_sample=False, max_new_tokens=10, cache_implementation=cache
            ))  # fmt: skip
    assert torch.equal(*tokens), f"{tokens[0].tolist()} instead of {tokens[1].tolist()}"
    assert tokens[0].shape[1] == IDS.shape[1] + 10 > tiny_models.WINDOW


def gradients(model: Any, name: str, **inputs: Any) -> dict[str, torch.Tensor]:
    """Gradients of the loss, in training mode."""
    model.zero_grad()
    model.train()
    try:
        with attending(model, name):
            model(**inputs, labels=LABELS[: len(inputs["input_ids"])]).loss.backward()
    finally:
        model.eval()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def largest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1)) for n in found)


def without_dropout(kind: str, build: Build) -> Any:
    model = build(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_eager_with_and_without_checkpointing(kind: str, build: Build) -> None:
    model = without_dropout(kind, build)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    expected = gradients(model, "eager", **inputs)
    assert sum(bool(g.any()) for g in expected.values()) > 10
    found = gradients(model, "hf_ext", **inputs)
    assert largest(found, expected) < CLOSE, largest(found, expected)
    for reentrant in (False, True):
        model = without_dropout(kind, build)
        adapter.checkpoint_activations(model, use_reentrant=reentrant)
        if reentrant:
            model.enable_input_require_grads()
        found = gradients(model, "hf_ext", **inputs)
        assert largest(found, expected) < CLOSE, (reentrant, largest(found, expected))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_dropout_of_weights_is_that_of_the_path_it_stands_for(kind: str, build: Build) -> None:
    model = build(kind)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = []
    for name in ("hf_ext", "eager" if kind == "gemma2" else "sdpa"):
        torch.manual_seed(0)
        found.append(gradients(model, name, input_ids=IDS, attention_mask=MASK))
    assert largest(*found) < CLOSE
    assert largest(found[0], gradients(model, "hf_ext", input_ids=IDS, attention_mask=MASK)) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "gpt_oss"])
def test_packed_sequences_do_not_see_each_other(kind: str, shared: Build) -> None:
    model = shared(kind)
    ids = IDS[:1]
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    found = logits(model, "hf_ext", **packed)
    difference = float((found - logits(model, "eager", **packed)).abs().max())
    assert difference < CLOSE, difference
    if kind == "gpt_oss":  # transformers does not tell it from one sequence: the model keeps the positions to itself
        return
    alone = torch.cat([logits(model, "hf_ext", input_ids=part) for part in (ids[:, :5], ids[:, 5:])], dim=1)
    difference = float((found - alone).abs().max())
    assert difference < CLOSE, difference


SEGMENTS = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0]])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "gpt_oss", "gpt2"])
def test_a_packed_structure_given_as_mask_is_the_dense_mask(kind: str, shared: Build, build: Build) -> None:
    model = shared(kind)
    structure = AttentionStructure.causal(torch.ones(1, 12)).segments(SEGMENTS)
    positions = structure.queries.position.long()
    with attending(model, "hf_ext"):
        dense = masks_for(model, structure)
    windowed = {"sliding_attention": structure.windowed(tiny_models.WINDOW), "full_attention": structure}
    one_for_each = {name: pack(s) for name, s in windowed.items()} if isinstance(dense, dict) else pack(structure)
    unknown = {n: m.clone() for n, m in one_for_each.items()} if isinstance(dense, dict) else one_for_each.clone()
    expected = logits(model, "hf_ext", input_ids=IDS[:1], attention_mask=dense, position_ids=positions)
    for given in (one_for_each, unknown):  # as it was packed, and as it comes from another device
        found = logits(model, "hf_ext", input_ids=IDS[:1], attention_mask=given, position_ids=positions)
        assert torch.equal(found, expected), float((found - expected).abs().max())
    causal = logits(model, "hf_ext", input_ids=IDS[:1])
    assert float((expected - causal).abs().max()) > 1e-2
    if kind in ("llama", "gemma2"):
        model = without_dropout(kind, build)
        inputs = {"input_ids": IDS[:1], "position_ids": positions}
        wanted = gradients(model, "hf_ext", **inputs, attention_mask=dense)
        for reentrant in (False, True):
            adapter.checkpoint_activations(model, use_reentrant=reentrant)
            model.enable_input_require_grads()
            assert largest(gradients(model, "hf_ext", **inputs, attention_mask=one_for_each), wanted) < CLOSE


def test_a_model_that_runs_attention_of_its_own_is_refused(tmp_path: Path) -> None:
    """transformers loads it with any name, and would attend with masks of another form: without causality."""
    import transformers as tf

    config = tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4)
    tf.BloomForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hf_ext")
    with pytest.raises(ValueError, match="models of BloomConfig run attention of their own"):
        model(IDS)


def test_a_model_that_computes_with_its_mask_is_refused_a_structure() -> None:
    """Where the kernels run a mask may be a packed structure; a model that adds to it would attend to nonsense."""
    import transformers as tf

    config = tf.DogeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    model = tf.DogeForCausalLM(config)
    model.set_attn_implementation("hf_ext")
    with kernels("always"), pytest.raises(ValueError, match="computes with its mask before it attends"):
        model(IDS, attention_mask=MASK)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_is_changed_in_place_is_read_anew(guard: Callable[[], Any], shared: Build) -> None:
    """What SDPA makes of a mask is kept for the layers that share it, and no longer."""
    model = shared("llama")
    with guard():
        mask = torch.ones(len(IDS), 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()
        before = logits(model, "hf_ext", input_ids=IDS, attention_mask=mask)
        mask[..., 2:, 1] = False
        after = logits(model, "hf_ext", input_ids=IDS, attention_mask=mask)
        assert torch.equal(after, logits(model, "sdpa", input_ids=IDS, attention_mask=mask.clone()))
        assert float((after - before).abs().max()) > 1e-3, "the mask that was changed says the same"


def test_layers_share_what_sdpa_adds_of_a_mask(shared: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[torch.Tensor] = []
    forward = adapter.sdpa_function()

    def note(module: Any, query: Any, key: Any, value: Any, mask: torch.Tensor, **kwargs: Any) -> Any:
        added.append(mask)
        return forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(backend, "_forward", note)
    logits(shared("llama"), "hf_ext", input_ids=IDS, attention_mask=MASK)
    assert len(added) == 2
    assert added[0] is added[1]
    assert added[0].dtype == torch.float32, "SDPA turns a mask of bool into numbers in every layer"


def test_a_structure_of_another_size_is_refused(shared: Build) -> None:
    packed = pack(AttentionStructure.causal(torch.ones(1, 7)))
    with pytest.raises(ValueError, match="14 queries and keys together"):
        logits(shared("llama"), "hf_ext", input_ids=IDS[:1], attention_mask=packed)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "gpt_oss"])
def test_it_compiles_into_one_graph(kind: str, build: Build) -> None:
    torch._dynamo.reset()
    model = build(kind)
    model.set_attn_implementation("hf_ext")
    structure = AttentionStructure.causal(torch.ones(1, 12)).segments(SEGMENTS)
    packed: Any = {"sliding_attention": pack(structure.windowed(8)).clone(), "full_attention": pack(structure).clone()}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mask in (MASK, None, packed) if kind == "gemma2" else (MASK, packed):
        rows = slice(1) if mask is packed else slice(None)
        inputs = {"input_ids": IDS[rows], "attention_mask": mask, "use_cache": False}
        with torch.no_grad():
            found, expected = compiled(**inputs).logits, model(**inputs).logits
        real = REAL if mask is MASK else torch.ones_like(REAL[rows])
        difference = float((found - expected)[real].abs().max())
        assert difference < CLOSE, difference


def test_a_compiled_training_step_has_the_same_gradients(build: Build) -> None:
    torch._dynamo.reset()
    model = build("llama")
    expected = gradients(model, "hf_ext", input_ids=IDS, attention_mask=MASK)
    model.set_attn_implementation("hf_ext")
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(input_ids=IDS, attention_mask=MASK, labels=LABELS, use_cache=False).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert largest(found, expected) < CLOSE, largest(found, expected)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_and_their_position_biases(kind: str) -> None:
    model = tiny_models.build(kind)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :5]}
    found, expected = (logits(model, name, **inputs) for name in ("hf_ext", "eager"))
    difference = float((found - expected).abs().max())
    assert difference < CLOSE, difference

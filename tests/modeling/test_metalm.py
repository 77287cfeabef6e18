"""MetaLM: the model contract, and what spans do to it."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    ViTConfig,
    ViTModel,
)

from hf_ext import hub, plugins
from hf_ext.adapter import checkpoint_activations
from hf_ext.generation import ContrastiveSearch, PromptLookup
from hf_ext.modeling.metalm.configuration_metalm import MetaLMConfig
from hf_ext.modeling.metalm.modeling_metalm import MetaLMForCausalLM
from hf_ext.modeling.metalm.spans_metalm import bounds_of, outside_spans
from hf_ext.testing.isolated import run_without
from hf_ext.testing.model import ModelContract
from hf_ext.testing.model_base import assert_close
from hf_ext.testing.tiny_models import VOCABULARY, build

DECODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 12, "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "num_channels": 1, "initializer_range": 0.3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
PATCHES = 5  # four, and the one that stands for the image
TOLERANCE = 2e-5


def docked(kind: str = "llama", vision: bool = False, text: bool = True) -> MetaLMForCausalLM:
    """A tiny decoder with tiny encoders, all with weights large enough for mistakes to show."""
    torch.manual_seed(0)
    parts = {"encoder": BertModel(BertConfig(**ENCODER)) if text else None}
    parts["vision_encoder"] = ViTModel(ViTConfig(**VISION)) if vision else None
    model = MetaLMForCausalLM.from_parts(decoder=build(kind), **parts)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "connector" in name:
                weight.normal_(std=0.3)
    return model.eval()


def ids(rows: int = 2, length: int = 14, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


SPANS = torch.tensor([[[2, 5], [8, 12]], [[1, 9], [-1, -1]]])


def by_hand(model: MetaLMForCausalLM, row: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    """The input of the language model, span by span without a batch."""
    embeds = model.get_input_embeddings()(row[None]).clone()
    for start, end in spans:
        embeds[:, start:end] = model.connector(model.encoder(input_ids=row[None, start:end]).last_hidden_state)
    return embeds


class TestMetaLM(ModelContract):
    model_class = MetaLMForCausalLM
    invalid_options = (
        ({"connector_layers": 0}, "connector_layers=0 must be a whole number >= 1"),
        ({"encoder_config": GPT2Config()}, "GPT2Model is causal"),
        ({"encoder_config": BertConfig(is_decoder=True)}, r"encoder_config is of a decoder \(bert\)"),
        ({"encoder_config": T5Config()}, r"encoder_config is of a decoder \(t5\)"),
        ({"encoder_config": BertConfig(vocab_size=63)}, "vocab_size=63, text_config 64"),
        ({"encoder_config": {"model_type": "no-such"}}, "encoder_config='no-such' is no configuration"),
        ({"vision_config": "vit"}, "vision_config='vit' is no configuration"),
        ({"text_config": T5Config()}, r"text_config is of an encoder-decoder \(t5\)"),
    )

    def config(self, **options):
        own = {k: options.pop(k) for k in (*MetaLMConfig.sub_configs, "connector_layers") if k in options}
        own.setdefault("text_config", LlamaConfig(**{**DECODER, **options}))
        return MetaLMConfig(**{"encoder_config": BertConfig(**ENCODER), **own})

    def test_every_parameter_gets_a_gradient(self):
        model, batch = self.make_model(), self.tokens()
        labels = outside_spans(batch, SPANS)
        model(batch, labels=labels, spans=SPANS).loss.backward()
        idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
        # the position table has more rows than the spans have tokens, and attention ignores the bias of its keys
        assert idle == set(), f"parameters without gradient: {idle}"

    def test_gradient_checkpointing_gives_the_same_gradients_with_spans(self):
        model, batch, found = self.make_model().train(), self.tokens(), []
        for reentrant in (None, False, True):
            if reentrant is not None:
                checkpoint_activations(model, use_reentrant=reentrant)
            model.zero_grad()
            model(batch, labels=outside_spans(batch, SPANS), spans=SPANS).loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert_close(found[1], found[0], 1e-6, "gradients with and without checkpointing")
        assert_close(found[2], found[0], 1e-6, "gradients with and without reentrant checkpointing")


# -- what is seen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "opt"])
@torch.no_grad()
def test_without_spans_it_is_the_language_model_bit_for_bit(kind):
    plain, batch = build(kind), ids()
    model = docked(kind)
    for given in ({}, {"spans": torch.full((2, 1, 2), -1)}, {"spans": torch.zeros_like(batch)}):
        ours, theirs = model(batch, labels=batch, **given), plain(batch, labels=batch)
        assert torch.equal(ours.logits, theirs.logits), "logits differ from those of the language model"
        assert torch.equal(ours.loss, theirs.loss)
    made = model.generate(batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(made, plain.generate(batch, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "opt"])
@torch.no_grad()
def test_encoder_outputs_take_the_place_of_embeddings(kind):
    model, batch = docked(kind), ids()
    found = model(batch, spans=SPANS).logits
    for row, spans in enumerate(([(2, 5), (8, 12)], [(1, 9)])):
        expected = model.language_model(inputs_embeds=by_hand(model, batch[row], spans)).logits[0]
        assert_close(found[row], expected, TOLERANCE, f"logits of row {row} in the batch and by hand")
    assert (found - model(batch).logits).abs().max() > 0.1, "spans changed nothing"


@torch.no_grad()
def test_tokens_of_a_span_see_each_other_and_nobody_before_sees_them():
    model, batch = docked(), ids(1)
    span = torch.tensor([[[4, 9]]])
    logits, embeds = model(batch, spans=span).logits[0], model.embed(batch, spans=span)[0]
    for column in range(4, 9):
        other = batch.clone()
        other[0, column] = 3 + (other[0, column] - 2) % 61
        changed = (model(other, spans=span).logits[0] - logits).abs().amax(-1)
        assert not changed[:4].any(), f"column {column} of the span is seen before it: {changed[:4]}"
        assert (changed[4:] > 1e-4).all(), f"column {column} of the span is not seen by all behind its start: {changed}"
        read = (model.embed(other, spans=span)[0] - embeds).abs().amax(-1)
        assert (read[4:9] > 1e-4).all(), f"column {column} is not seen by all of its span: {read}"
        assert not read[:4].any()
        assert not read[9:].any()
    other = batch.clone()
    other[0, 3] = 3 + (other[0, 3] - 2) % 61
    assert torch.equal(model.embed(other, spans=span)[0, 4:], embeds[4:]), "the encoder has read beyond the span"


@torch.no_grad()
def test_numbers_of_spans_mean_the_same_as_bounds():
    numbers = torch.zeros(2, 14, dtype=torch.long)
    numbers[0, 2:5], numbers[0, 8:12], numbers[1, 1:9] = 7, 1, 2
    assert bounds_of(numbers).tolist() == SPANS.tolist()
    model, batch = docked(), ids()
    assert torch.equal(model(batch, spans=numbers).logits, model(batch, spans=SPANS).logits)
    made = [model.generate(batch, spans=spans, max_new_tokens=4, do_sample=False) for spans in (numbers, SPANS)]
    assert torch.equal(*made)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_logits(side):
    model, batch = docked(), ids()
    alone = [model(batch[:1, :9], spans=SPANS[:1, :1]).logits[0], model(batch[1:], spans=SPANS[1:]).logits[0]]
    pad = (5, 0) if side == "left" else (0, 5)
    both = torch.cat([torch.nn.functional.pad(batch[:1, :9], pad), batch[1:]])
    mask = torch.nn.functional.pad(torch.ones(2, 9, dtype=torch.long), pad)
    mask[1] = 1
    spans = torch.tensor([[[2, 5]], [[1, 9]]])
    spans[0] += pad[0]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(both, attention_mask=mask, position_ids=positions, spans=spans).logits
    assert_close(found[0][mask[0].bool()], alone[0], TOLERANCE, f"logits of the row padded on the {side} and alone")
    assert_close(found[1], alone[1], TOLERANCE, "logits of the longer row in the batch and alone")


@pytest.mark.parametrize("backend", ["sdpa", "hf_ext"])
@torch.no_grad()
def test_attention_implementations_agree_on_spans(backend):
    model, batch = docked(vision=True), ids()
    model.set_attn_implementation("eager")
    expected = model(batch, spans=SPANS).logits
    model.set_attn_implementation(backend)
    assert model.encoder.config._attn_implementation == model.language_model.config._attn_implementation == backend
    assert_close(model(batch, spans=SPANS).logits, expected, TOLERANCE, f"logits of {backend} and eager")


# -- generation ------------------------------------------------------------------------------------------


def encodings(model, run):
    """Return what `run` returns, and how many spans the encoder read on the way."""
    rows = []
    hook = model.encoder.register_forward_pre_hook(
        lambda _, args, kw: rows.append(len(kw["input_ids"])), with_kwargs=True
    )
    try:
        return run(), rows
    finally:
        hook.remove()


@torch.no_grad()
def test_generation_continues_the_prompt_and_encodes_its_spans_once():
    model, batch = docked(), ids()
    made, rows = encodings(model, lambda: model.generate(batch, spans=SPANS, max_new_tokens=7, do_sample=False))
    assert rows == [3], f"the encoder read {rows} spans; expected the three of the prompt, once"
    expected = model(made[:, :-1], spans=SPANS).logits[:, -7:].argmax(-1)
    assert torch.equal(made[:, -7:], expected), f"generate made {made[:, -7:]}, not {expected}"
    assert not torch.equal(made, model.generate(batch, max_new_tokens=7, do_sample=False)), "spans changed nothing"


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}, {"custom_generate": "contrastive"}],
    ids=str,
)
@torch.no_grad()
def test_a_row_of_a_padded_batch_is_continued_as_alone(options):
    model, batch = docked(), ids()
    if "custom_generate" in options:
        options = {"custom_generate": ContrastiveSearch(top_k=3)}
    both = torch.cat([torch.nn.functional.pad(batch[:1, :9], (5, 0)), batch[1:]])
    mask = (torch.arange(14) >= torch.tensor([[5], [0]])).long()
    spans = torch.tensor([[[7, 10]], [[1, 9]]])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    together = model.generate(both, attention_mask=mask, spans=spans, **settings)[:, -5:]
    alone = [model.generate(batch[:1, :9], spans=SPANS[:1, :1], **settings)[:, -5:]]
    alone += [model.generate(batch[1:], spans=SPANS[1:], **settings)[:, -5:]]
    assert torch.equal(together, torch.cat(alone)), f"{together.tolist()} in a batch, {torch.cat(alone).tolist()} alone"


@torch.no_grad()
def test_a_second_turn_reads_the_spans_behind_the_cache():
    model, batch = docked(), ids(1)
    spans = SPANS[:1]
    cache = model(batch[:, :7], spans=spans[:, :1], use_cache=True).past_key_values
    settings = {"spans": spans, "max_new_tokens": 5, "do_sample": False}
    made, rows = encodings(model, lambda: model.generate(batch, past_key_values=cache, **settings))
    assert rows == [1], f"the encoder read {rows} spans; expected the second one only"
    assert torch.equal(made, model.generate(batch, **settings))
    cache = model(batch[:, :10], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache ends after 10 tokens, inside a span"):
        model.generate(batch, past_key_values=cache, **settings)


@torch.no_grad()
def test_speculation_goes_on_from_spans_as_greedy_search_does():
    model, batch = docked(), ids(1, 7).repeat(1, 2)  # a prompt that says everything twice, which lookup drafts from
    batch = torch.cat([torch.nn.functional.pad(batch, (2, 0)), ids(1, 16)])
    given = {"attention_mask": (batch != 0).long(), "spans": torch.tensor([[[4, 8]], [[1, 9]]])}
    settings = {**given, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    strategy = PromptLookup()
    made, rows = encodings(model, lambda: model.generate(batch, custom_generate=strategy, **settings))
    assert torch.equal(made, model.generate(batch, **settings))
    assert rows == [2], f"the encoder read {rows} spans; expected those of the prompt, once"


@torch.no_grad()
def test_a_forward_pass_behind_a_cache_takes_embeddings_in_place_of_spans():
    model, batch = docked(), ids(1)
    full = model(batch, spans=SPANS[:1]).logits
    cache = model(batch[:, :7], spans=SPANS[:1, :1], use_cache=True).past_key_values
    rest = SPANS[:1, 1:] - 7
    with pytest.raises(ValueError, match=r"the cache holds 7 tokens already: .* inputs_embeds=model.embed"):
        model(batch[:, 7:], spans=rest, past_key_values=cache)
    embeds = model.embed(batch[:, 7:], spans=rest)
    found = model(inputs_embeds=embeds, past_key_values=cache).logits
    assert_close(found, full[:, 7:], TOLERANCE, "logits behind a cache and in one piece")


# -- images ----------------------------------------------------------------------------------------------

IMAGE_SPANS = torch.tensor([[[0, 5], [6, 11]], [[3, 8], [-1, -1]]])


def pixels() -> torch.Tensor:
    return torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_images_and_text_spans_stand_side_by_side():
    model, batch = docked(vision=True), ids()
    spans = torch.tensor([[[12, 14]], [[9, 12]]])
    found = model(batch, spans=spans, image_spans=IMAGE_SPANS, pixel_values=pixels()).logits
    places = (((0, 0), (0, 1)), ((1, 0),))
    for row, images in enumerate(places):
        embeds = by_hand(model, batch[row], [tuple(spans[row, 0].tolist())])
        for at, entry in images:
            start, end = IMAGE_SPANS[at, entry].tolist()
            state = model.vision_encoder(pixel_values=pixels()[at, entry][None]).last_hidden_state
            embeds[:, start:end] = model.vision_connector(state)
        expected = model.language_model(inputs_embeds=embeds).logits[0]
        assert_close(found[row], expected, TOLERANCE, f"logits of row {row} with images and by hand")
    other = batch.clone()
    other[0, 0:5] = 3
    same = model(other, spans=spans, image_spans=IMAGE_SPANS, pixel_values=pixels()).logits
    assert torch.equal(same, found), "ids below an image are seen"


@torch.no_grad()
def test_a_model_of_images_only_generates():
    model, batch = docked(vision=True, text=False), ids()
    images = {"image_spans": IMAGE_SPANS[:, :1], "pixel_values": pixels()[:, 0]}  # one a row needs no axis of its own
    made = model.generate(batch, max_new_tokens=5, do_sample=False, **images)
    expected = model(made[:, :-1], **images).logits[:, -5:].argmax(-1)
    assert torch.equal(made[:, -5:], expected)
    beams = model.generate(batch, max_new_tokens=5, do_sample=False, num_beams=2, **images)
    alone = model.generate(
        batch[1:], max_new_tokens=5, do_sample=False, num_beams=2, **{name: value[1:] for name, value in images.items()}
    )
    assert torch.equal(beams[1:], alone)


# -- parts, files ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_parts_keep_their_heads_and_share_their_weights():
    encoder, decoder = BertForMaskedLM(BertConfig(**ENCODER)), build("llama")
    model = MetaLMForCausalLM.from_parts(encoder, decoder)
    assert model.language_model is decoder
    assert model.encoder is encoder.bert
    pooled = BertModel(BertConfig(**ENCODER))
    model = MetaLMForCausalLM.from_parts(pooled, decoder, connector_layers=3)
    assert pooled.pooler is not None
    assert model.encoder.pooler is None
    weight = model.encoder.embeddings.word_embeddings.weight
    assert weight.data_ptr() == pooled.embeddings.word_embeddings.weight.data_ptr()
    assert [layer.out_features for layer in model.connector if hasattr(layer, "out_features")] == [32, 32, 32]
    same = pooled.eval()(ids(length=12)).last_hidden_state
    assert torch.equal(model.eval().encoder(ids(length=12)).last_hidden_state, same)


@torch.no_grad()
def test_a_saved_model_reads_spans_as_before(tmp_path):
    model, batch = docked("gpt2", vision=True), ids()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    given = {"image_spans": IMAGE_SPANS, "pixel_values": pixels(), "spans": torch.tensor([[[12, 14]], [[9, 12]]])}
    assert torch.equal(again(batch, **given).logits, model(batch, **given).logits)
    assert again.config.encoder_config.to_diff_dict().keys() >= {"vocab_size", "hidden_size"}
    assert again.config.text_config.model_type == "gpt2"


@torch.no_grad()
def test_an_exported_model_reads_spans_where_hf_ext_is_not_installed(tmp_path):
    model, batch = docked(), ids()
    folder = hub.export("metalm", tmp_path / "metalm", model=model, check=False)
    assert (folder / "semi_causal_metalm.py").is_file(), "the collator does not travel with the model"
    (tmp_path / "home").mkdir()
    torch.save({"ids": batch, "spans": SPANS}, tmp_path / "given.pt")
    script = """
import torch, transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder, given = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
batch = torch.load(given)
with torch.no_grad():
    logits = model(batch["ids"], spans=batch["spans"]).logits
    tokens = model.generate(batch["ids"], spans=batch["spans"], max_new_tokens=4, do_sample=False)
collator = get_class_from_dynamic_module("semi_causal_metalm.SemiCausalCollator", folder)(min_length=2, max_length=4)
made = collator([{"input_ids": row} for row in batch["ids"].tolist()])
torch.save({"logits": logits, "tokens": tokens, "loss": model(**made).loss.detach()}, given)
"""
    run_without(["hf_ext"], script, folder, tmp_path / "given.pt", home=tmp_path / "home")
    there = torch.load(tmp_path / "given.pt")
    assert_close(there["logits"], model(batch, spans=SPANS).logits, 1e-6, "logits here and there")
    assert torch.equal(there["tokens"], model.generate(batch, spans=SPANS, max_new_tokens=4, do_sample=False))
    assert there["loss"].isfinite()


def test_the_plugin_is_the_model():
    plugin = plugins.get("metalm")
    assert plugin.kind == "model"
    assert plugin.load() is MetaLMForCausalLM


def test_freezing_leaves_the_last_layers_of_the_encoders():
    model = docked(vision=True).freeze_encoders(1)
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not any("embeddings" in name for name in learning if "encoder" in name)
    assert {name.split(".")[3] for name in learning if name.startswith("encoder.")} == {"1"}
    assert {"connector.0.weight", "vision_connector.0.weight"} <= learning
    assert not any(
        name.startswith("encoder.") for name, p in docked().freeze_encoders(0).named_parameters() if p.requires_grad
    )
    with pytest.raises(ValueError, match="trainable_layers=3 must be from 0 to 2"):
        docked().freeze_encoders(3)


def test_resizing_the_vocabulary_reaches_the_language_model():
    model = docked()
    model.resize_token_embeddings(70)
    assert model.language_model.config.vocab_size == model.config.vocab_size == 70
    assert model(ids(), labels=ids()).logits.shape[-1] == 70


# -- wrong input -----------------------------------------------------------------------------------------


def bounds(*entries):
    return torch.tensor([[list(entry) for entry in entries]])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (bounds((2, 6), (4, 8)), r"\[4, 8\) of row 0 overlaps the span \[2, 6\) of row 0; spans must not overlap"),
        (bounds((2, 8), (4, 6)), r"\[4, 6\) of row 0 lies inside the span \[2, 8\) of row 0; spans must not be nested"),
        (bounds((2, 6), (2, 6)), "spans must not be nested"),
        (bounds((10, 15)), r"\[10, 15\) of row 0 lies outside the text, which has 14 columns"),
        (bounds((-2, 3)), r"\[-2, 3\) of row 0 lies outside"),
        (bounds((5, 3)), r"\[5, 3\) of row 0 lies outside"),
        (bounds((4, 4)), r"\[4, 4\) of row 0 is empty; leave it out"),
        (bounds((0, 3)), r"\[0, 3\) of row 0 covers padding"),
        (bounds((2, 14)).expand(2, 1, 2), "spans has 2 rows, the batch 1"),
        (bounds((1.0, 2.0)), "spans must be a tensor of whole numbers, got torch.float32"),
        (torch.zeros(1, dtype=torch.long), r"spans has the shape \(1,\); expected \(batch, entries, 2\)"),
        (torch.tensor([[0, 1, 1, 0, 1, *[0] * 9]]), "the span 1 of row 0 in several pieces"),
        (torch.tensor([[0, -1, *[0] * 12]]), "spans has -1 in row 0"),
    ],
)
def test_wrong_spans_are_refused(spans, message):
    model, batch = docked(), ids(1)
    mask = (torch.arange(14) >= 2).long()[None]
    with pytest.raises(ValueError, match=message):
        model(batch, attention_mask=mask, spans=spans)
    with pytest.raises(ValueError, match=message):
        model.generate(batch, attention_mask=mask, spans=spans, max_new_tokens=2, do_sample=False)


def test_labels_inside_a_span_are_refused_and_can_be_masked():
    model, batch = docked(), ids()
    with pytest.raises(ValueError, match=r"\[2, 5\) of row 0 has labels inside, .* outside_spans"):
        model(batch, labels=batch, spans=SPANS)
    labels = outside_spans(batch, SPANS)
    assert (labels != -100).sum() == batch.numel() - 3 - 4 - 8
    output = model(batch, labels=labels, spans=SPANS)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert_close(output.loss, expected, 1e-6, "the loss and the cross-entropy of tokens outside spans")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"spans": SPANS, "inputs_embeds": torch.zeros(2, 14, 32)}, "spans are read from input_ids"),
        ({"image_spans": IMAGE_SPANS}, "image_spans and pixel_values go together"),
        ({"pixel_values": pixels()}, "image_spans and pixel_values go together"),
        ({"image_spans": IMAGE_SPANS - 0, "pixel_values": pixels()[:, 0]}, "at least 2 images a row"),
        ({"image_spans": torch.tensor([[[0, 4]], [[0, 4]]]), "pixel_values": pixels()}, "has 4 columns for an image"),
        (
            {"image_spans": IMAGE_SPANS, "pixel_values": pixels(), "spans": torch.tensor([[[4, 6]], [[0, 2]]])},
            "overlaps",
        ),
    ],
)
def test_images_and_embeddings_that_do_not_fit_are_refused(given, message):
    model = docked(vision=True)
    with pytest.raises(ValueError, match=message):
        model(ids(), **given)


def test_a_span_longer_than_the_position_table_is_refused():
    model, batch = docked(), ids()
    with pytest.raises(ValueError, match=r"\[0, 13\) of row 0 has 13 tokens, but BertModel has positions for 12"):
        model(batch, spans=torch.tensor([[[0, 13]], [[0, 3]]]))
    encoder = RobertaModel(RobertaConfig(**{**ENCODER, "pad_token_id": 1}))  # counts positions from 2
    model = MetaLMForCausalLM.from_parts(encoder, build("llama")).eval()
    with pytest.raises(ValueError, match="RobertaModel has positions for 10"):
        model(batch, spans=torch.tensor([[[0, 11]], [[0, 3]]]))
    assert model(batch, spans=torch.tensor([[[0, 10]], [[0, 3]]])).logits.isfinite().all()


def test_an_encoder_of_another_width_than_its_configuration_is_refused():
    model = docked()
    model.encoder.encoder.layer[-1].register_forward_hook(lambda *_: torch.zeros(3, 8, 20))
    with pytest.raises(ValueError, match="outputs are 20 wide, but its configuration has hidden_size=24"):
        model(ids(), spans=SPANS)


def test_parts_of_another_kind_are_refused():
    encoder, decoder = BertModel(BertConfig(**ENCODER)), build("llama")
    causal = GPT2Model(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2))
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    for given, message in (
        ({"decoder": decoder}, "needs an encoder"),
        ({"encoder": encoder}, "decoder is NoneType; expected a causal language model"),
        ({"encoder": encoder, "decoder": decoder.model}, "decoder is LlamaModel; expected a causal language model"),
        ({"encoder": torch.nn.Linear(2, 2), "decoder": decoder}, "encoder is Linear; expected an encoder"),
        ({"encoder": causal, "decoder": decoder}, "is causal"),
        ({"vision_encoder": encoder.encoder, "decoder": decoder}, "vision_encoder is BertEncoder"),
        ({"encoder": encoder, "decoder": recurrent}, "MambaForCausalLM has a recurrent state"),
    ):
        with pytest.raises(ValueError, match=message):
            MetaLMForCausalLM.from_parts(**given)


def test_spans_of_a_prompt_read_in_pieces_are_refused():
    with pytest.raises(ValueError, match="prefill_chunk_size=4 reads a prompt in pieces"):
        docked().generate(ids(), spans=SPANS, prefill_chunk_size=4, max_new_tokens=2)
    with pytest.raises(ValueError, match="needs encoder, which this model lacks"):
        docked(vision=True, text=False)(ids(), spans=SPANS)

"""Encoders of images, parts, files and freezing."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
)

from hf_ext import hub, plugins
from hf_ext.modeling.metalm.modeling_metalm import MetaLMForCausalLM
from hf_ext.testing.isolated import run_without
from hf_ext.testing.model_base import assert_close
from hf_ext.testing.tiny_models import build

# -- images ----------------------------------------------------------------------------------------------

IMAGE_SPANS = torch.tensor([[[0, 5], [6, 11]], [[3, 8], [-1, -1]]])


def pixels() -> torch.Tensor:
    return torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_images_and_text_spans_stand_side_by_side(tiny):
    model, batch = tiny.docked(vision=True), tiny.ids()
    spans = torch.tensor([[[12, 14]], [[9, 12]]])
    found = model(batch, spans=spans, image_spans=IMAGE_SPANS, pixel_values=pixels()).logits
    places = (((0, 0), (0, 1)), ((1, 0),))
    for row, images in enumerate(places):
        embeds = tiny.by_hand(model, batch[row], [tuple(spans[row, 0].tolist())])
        for at, entry in images:
            start, end = IMAGE_SPANS[at, entry].tolist()
            state = model.vision_encoder(pixel_values=pixels()[at, entry][None]).last_hidden_state
            embeds[:, start:end] = model.vision_connector(state)
        expected = model.language_model(inputs_embeds=embeds).logits[0]
        assert_close(found[row], expected, tiny.TOLERANCE, f"logits of row {row} with images and by hand")
    other = batch.clone()
    other[0, 0:5] = 3
    same = model(other, spans=spans, image_spans=IMAGE_SPANS, pixel_values=pixels()).logits
    assert torch.equal(same, found), "ids below an image are seen"


@torch.no_grad()
def test_a_model_of_images_only_generates(tiny):
    model, batch = tiny.docked(vision=True, text=False), tiny.ids()
    images = {"image_spans": IMAGE_SPANS[:, :1], "pixel_values": pixels()[:, 0]}  # one a row needs no axis of its own
    made = model.generate(batch, max_new_tokens=5, do_sample=False, **images)
    expected = model(made[:, :-1], **images).logits[:, -5:].argmax(-1)
    assert torch.equal(made[:, -5:], expected)
    beams = model.generate(batch, max_new_tokens=5, do_sample=False, num_beams=2, **images)
    alone = model.generate(
        batch[1:], max_new_tokens=5, do_sample=False, num_beams=2, **{name: value[1:] for name, value in images.items()}
    )
    assert torch.equal(beams[1:], alone)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"spans": IMAGE_SPANS, "inputs_embeds": torch.zeros(2, 14, 32)},
            "spans are read from input_ids",
        ),
        ({"image_spans": IMAGE_SPANS}, "image_spans and pixel_values go together"),
        ({"pixel_values": pixels()}, "image_spans and pixel_values go together"),
        ({"image_spans": IMAGE_SPANS, "pixel_values": pixels()[:, 0]}, "at least 2 images a row"),
        ({"image_spans": torch.tensor([[[0, 4]], [[0, 4]]]), "pixel_values": pixels()}, "has 4 columns for an image"),
        (
            {"image_spans": IMAGE_SPANS, "pixel_values": pixels(), "spans": torch.tensor([[[4, 6]], [[0, 2]]])},
            "overlaps",
        ),
    ],
)
def test_images_and_embeddings_that_do_not_fit_are_refused(tiny, given, message):
    model = tiny.docked(vision=True)
    with pytest.raises(ValueError, match=message):
        model(tiny.ids(), **given)


# -- parts, files ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_parts_keep_their_heads_and_share_their_weights(tiny):
    encoder, decoder = BertForMaskedLM(BertConfig(**tiny.ENCODER)), build("llama")
    model = MetaLMForCausalLM.from_parts(encoder, decoder)
    assert model.language_model is decoder
    assert model.encoder is encoder.bert
    pooled = BertModel(BertConfig(**tiny.ENCODER))
    model = MetaLMForCausalLM.from_parts(pooled, decoder, connector_layers=3)
    assert pooled.pooler is not None
    assert model.encoder.pooler is None
    weight = model.encoder.embeddings.word_embeddings.weight
    assert weight.data_ptr() == pooled.embeddings.word_embeddings.weight.data_ptr()
    assert [layer.out_features for layer in model.connector if hasattr(layer, "out_features")] == [32, 32, 32]
    same = pooled.eval()(tiny.ids(length=12)).last_hidden_state
    assert torch.equal(model.eval().encoder(tiny.ids(length=12)).last_hidden_state, same)


@torch.no_grad()
def test_a_saved_model_reads_spans_as_before(tiny, tmp_path):
    model, batch = tiny.docked("gpt2", vision=True), tiny.ids()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    given = {"image_spans": IMAGE_SPANS, "pixel_values": pixels(), "spans": torch.tensor([[[12, 14]], [[9, 12]]])}
    assert torch.equal(again(batch, **given).logits, model(batch, **given).logits)
    assert again.config.encoder_config.to_diff_dict().keys() >= {"vocab_size", "hidden_size"}
    assert again.config.text_config.model_type == "gpt2"


@torch.no_grad()
def test_an_exported_model_reads_spans_where_hf_ext_is_not_installed(tiny, tmp_path):
    model, batch = tiny.docked(), tiny.ids()
    folder = hub.export("metalm", tmp_path / "metalm", model=model, check=False)
    assert (folder / "semi_causal_metalm.py").is_file(), "the collator does not travel with the model"
    (tmp_path / "home").mkdir()
    torch.save({"ids": batch, "spans": tiny.SPANS}, tmp_path / "given.pt")
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
    assert_close(there["logits"], model(batch, spans=tiny.SPANS).logits, 1e-6, "logits here and there")
    assert torch.equal(there["tokens"], model.generate(batch, spans=tiny.SPANS, max_new_tokens=4, do_sample=False))
    assert there["loss"].isfinite()


def test_the_plugin_is_the_model():
    plugin = plugins.get("metalm")
    assert plugin.kind == "model"
    assert plugin.load() is MetaLMForCausalLM


def test_its_configuration_can_be_imported_first(tmp_path):
    script = """
import warnings
warnings.simplefilter("error", UserWarning)
from hf_ext.modeling.metalm.configuration_metalm import MetaLMConfig
from transformers import AutoConfig
assert type(AutoConfig.for_model("metalm")) is MetaLMConfig
"""
    run_without([], script, home=tmp_path)


def test_freezing_leaves_the_last_layers_of_the_encoders(tiny):
    model = tiny.docked(vision=True).freeze_encoders(1)
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not any("embeddings" in name for name in learning if "encoder" in name)
    assert {name.split(".")[3] for name in learning if name.startswith("encoder.")} == {"1"}
    assert {"connector.0.weight", "vision_connector.0.weight"} <= learning
    assert not any(
        name.startswith("encoder.")
        for name, p in tiny.docked().freeze_encoders(0).named_parameters()
        if p.requires_grad
    )
    with pytest.raises(ValueError, match="trainable_layers=3 must be from 0 to 2"):
        tiny.docked().freeze_encoders(3)


def test_resizing_the_vocabulary_reaches_the_language_model(tiny):
    model = tiny.docked()
    model.resize_token_embeddings(70)
    assert model.language_model.config.vocab_size == model.config.vocab_size == 70
    assert model(tiny.ids(), labels=tiny.ids()).logits.shape[-1] == 70

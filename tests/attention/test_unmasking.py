"""Layerwise unmasking: which layers look right, and that a checkpoint remembers it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, Trainer, TrainingArguments

from hf_ext import adapter
from hf_ext.attention.intercept import intercept
from hf_ext.attention.unmasking import LayerwiseUnmasking, both_ways
from hf_ext.testing import tiny_models
from hf_ext.testing.strategy_base import close, refusal

IDS, MASK = tiny_models.prompts((12, 7, 3))
RIGHT = MASK.flip(1)  # labels of tokens are usually padded on the right


def logits(model: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=mask, use_cache=False).logits


def labelling(kind: str = "llama") -> Any:
    config = copy.deepcopy(tiny_models.shared(kind).config)
    config.num_labels = 5
    return tiny_models.fill(AutoModelForTokenClassification.from_config(config))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_only_the_chosen_layers_look_both_ways(kind, attention):
    model = tiny_models.build(kind, attn_implementation=attention)
    window = tiny_models.WINDOW if kind in ("mistral", "gemma3") else 10**6

    def opened(real: torch.Tensor) -> Any:
        def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, plain: Any, **call: Any) -> Any:
            if module.layer_idx != 0:  # in gemma3 the one with a window
                return plain(module, query, key, value, mask, **call)
            places = torch.arange(query.shape[2])
            near = (places[:, None] - places).abs() < window
            seen = (near & real[:, None, :])[:, None]
            if attention == "eager":
                seen = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
            return plain(module, query, key, value, seen, **call)

        return attend

    causal = {name: logits(model, mask) for name, mask in (("none", None), ("right", RIGHT), ("left", MASK))}
    for name, mask in (("none", torch.ones_like(MASK)), ("right", RIGHT), ("left", MASK)):
        given = None if name == "none" else mask
        with intercept(model, opened(mask.bool())):
            expected = logits(model, given)
        LayerwiseUnmasking([0]).attach(model)
        ours = logits(model, given)
        LayerwiseUnmasking.detach(model)
        real = mask.bool()
        close(ours[real], expected[real], f"{kind}, {attention}, padding: {name}", 2e-5)
        assert (ours[real] - causal[name][real]).abs().max() > 1e-3, "unmasking changed nothing"
        assert torch.equal(logits(model, given), causal[name]), "detach left something behind"


def test_patterns_name_groups_of_layers():
    assert LayerwiseUnmasking("0110").chosen(8) == [2, 3, 4, 5]
    assert LayerwiseUnmasking("1").chosen(3) == LayerwiseUnmasking("all").chosen(3) == [0, 1, 2]
    assert LayerwiseUnmasking("000").chosen(6) == []
    assert LayerwiseUnmasking((4, 1, 4)).chosen(6) == [1, 4]


def test_no_layers_leave_the_model_to_the_last_bit():
    model = tiny_models.build("llama")
    expected = logits(model, RIGHT)
    assert torch.equal(logits(LayerwiseUnmasking("00").attach(model), RIGHT), expected)


def test_the_mirror_of_a_window_is_a_window():
    places, q = torch.arange(6), torch.zeros(1, 1, 6, 4)
    real = torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    causal = ((places[:, None] >= places) & (places[:, None] - places < 2) & real)[None, None]
    found = both_ways(causal, q, q)[0, 0]
    assert torch.equal(found[:4], ((places[:, None] - places).abs() < 2)[:4] & real)
    added = torch.zeros(1, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert torch.equal(both_ways(added, q, q)[0, 0] == 0, found)
    assert both_ways(None, q, q) is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral"])
def test_a_saved_model_is_unmasked_again(kind, tmp_path):
    model = LayerwiseUnmasking("10").attach(labelling(kind))
    expected = logits(model, RIGHT)
    model.save_pretrained(tmp_path)
    assert (LayerwiseUnmasking.of(tmp_path).layers, model.config.unmasked_layers) == ([0], [0])
    loaded = LayerwiseUnmasking.load(AutoModelForTokenClassification, tmp_path)
    close(logits(loaded, RIGHT), expected, f"{kind}, saved and loaded", 1e-6)
    assert torch.equal(logits(copy.deepcopy(model), RIGHT), expected), "a copy is causal again"
    causal = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert not torch.allclose(logits(causal, RIGHT)[RIGHT.bool()], expected[RIGHT.bool()], atol=1e-3)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[row], "attention_mask": RIGHT[row], "labels": IDS[row] % 5}


def trained(model: Any, folder: Any, unmasking: LayerwiseUnmasking) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=3, save_steps=2, report_to=[],
        learning_rate=1e-2, use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[unmasking]).train()


def test_the_stock_trainer_trains_and_saves_it(tmp_path):
    model = labelling()
    trained(model, tmp_path, LayerwiseUnmasking("01"))
    assert model.config.unmasked_layers == [1]
    model.eval()
    expected = logits(model, RIGHT)
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "layerwise_unmasking.json").is_file()
    loaded = LayerwiseUnmasking.load(AutoModelForTokenClassification, checkpoint).eval()
    close(logits(loaded, RIGHT), expected, "trained, saved and loaded", 1e-6)
    causal = labelling()
    trained(causal, tmp_path / "causal", LayerwiseUnmasking("00"))
    assert not torch.allclose(logits(causal.eval(), RIGHT), expected, atol=1e-3)


def test_an_adapter_remembers_it(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="TOKEN_CLS", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(labelling(), config)
    trained(model, tmp_path, LayerwiseUnmasking("01"))
    expected = logits(model.eval(), RIGHT)
    checkpoint = tmp_path / "checkpoint-2"
    again = peft.PeftModel.from_pretrained(labelling(), checkpoint)
    again = LayerwiseUnmasking.of(checkpoint).attach(again).eval()
    close(logits(again, RIGHT), expected, "an adapter, saved and loaded", 1e-6)


def test_gradients_reach_a_token_from_its_left():
    model = LayerwiseUnmasking("all").attach(tiny_models.build("llama"))
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[:, 0].sum().backward()
    assert bool((embeds.grad[:, -1].abs().sum(-1) > 0).all())


def test_attaching_twice_changes_the_choice_and_nothing_more():
    model = tiny_models.build("llama")
    expected = logits(LayerwiseUnmasking([1]).attach(tiny_models.build("llama")))
    LayerwiseUnmasking([0]).attach(model)
    LayerwiseUnmasking([1]).attach(model)
    assert torch.equal(logits(model), expected)
    LayerwiseUnmasking.detach(model)
    assert adapter.attention_implementation(model) == "sdpa"


def test_what_makes_no_sense_is_refused(tmp_path):
    model = tiny_models.build("llama")
    refusal(lambda: LayerwiseUnmasking("01x"), "pattern", what="a pattern with a letter")
    refusal(lambda: LayerwiseUnmasking(""), "pattern", what="an empty pattern")
    refusal(lambda: LayerwiseUnmasking([-1]), "at least 0", what="a negative number")
    refusal(lambda: LayerwiseUnmasking("101").attach(model), "equal groups", what="three groups of two layers")
    refusal(lambda: LayerwiseUnmasking([2]).attach(model), "2 layers", what="layer 2 of two")
    refusal(lambda: LayerwiseUnmasking().attach(tiny_models.shared("t5")), "encoder-decoder", what="T5")
    refusal(lambda: LayerwiseUnmasking().attach(tiny_models.shared("openai-gpt")), "AttentionInterface", what="GPT")
    refusal(lambda: LayerwiseUnmasking.of(tmp_path), "not saved unmasked", what="an empty folder")
    LayerwiseUnmasking().attach(model)
    refusal(lambda: model.generate(IDS, attention_mask=MASK, max_new_tokens=3), "cache", what="generating")

"""Bitune: prompts read twice, against passes made one by one without a batch and without a running cache."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import LoraConfig
from transformers import DynamicCache

from hf_ext.attention import AttentionStructure, masks_for
from hf_ext.generation import ContrastiveSearch, PromptLookup
from hf_ext.generation.bitune import Bitune
from hf_ext.generation.bitune_model import BituneModel
from hf_ext.generation.plain import PlainDecoding
from hf_ext.generation.structured.twice import CAUSAL, CacheMix, adapter_layers, reading_with
from hf_ext.testing import structured, tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import close, refusal, same_tokens
from hf_ext.testing.twice import prefix_caches, row_logits

SETTINGS = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 5}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
PLAIN_SHARED, PLAIN_BUILD = tiny_models.shared, tiny_models.build


def adapted(kind: str, keys: float = 0.6, values: float = 0.3) -> BituneModel:
    """A tiny model with two random adapters."""
    model = with_adapters(PLAIN_BUILD(kind)).eval()
    model.mix.fill(keys, values)
    return model


def with_adapters(model) -> BituneModel:
    torch.manual_seed(3)
    turned = model.config.model_type == "gpt2"
    return BituneModel(
        model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=turned)
    )


@functools.cache
def shared(kind: str) -> BituneModel:
    return adapted(kind)


class TestConformance(StrategyConformance):
    """The suite calls `generate` of the transformers model inside, on which the adapters are.

    It compares with the model's own forward pass as well, so that the share of the second pass is 0 here.
    """

    def strategy(self):
        return Bitune()

    models = ("llama",)  # the others follow below

    @pytest.fixture(autouse=True)
    def models_with_adapters(self, monkeypatch):
        def build(kind, **changes):
            model = PLAIN_BUILD(kind, **changes)
            return causal(model) if kind in tiny_models.DECODERS else model

        def find(kind):
            return causal_shared(kind) if kind in tiny_models.DECODERS else PLAIN_SHARED(kind)

        monkeypatch.setattr(tiny_models, "build", build)
        monkeypatch.setattr(tiny_models, "shared", find)


def causal(model):
    model = with_adapters(model).eval()
    model.mix.fill(0, 0)
    return model.get_base_model()


@functools.cache
def causal_shared(kind: str):
    return causal(PLAIN_BUILD(kind))


def prompts():
    """Three rows, one longer than the windows of the sliding models, one of a single token."""
    return tiny_models.prompts((21, 9, 1))


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_batches_with_a_cache_are_rows_read_anew_at_every_step(kind):
    model, (ids, mask) = shared(kind), prompts()
    out = model.generate(input_ids=ids, attention_mask=mask, **SETTINGS, **LOGITS)
    for row in range(len(ids)):
        text = ids[row : row + 1, mask[row].bool()]
        length = text.shape[1]
        for step, logits in enumerate(out.logits):
            expected = row_logits(model, text, length, 0.6, 0.3)[:, -1]
            close(logits[row : row + 1], expected, f"{kind}, row {row}, step {step}", tolerance=3e-5)
            text = torch.cat([text, expected.argmax(-1, keepdim=True)], dim=1)
        same_tokens(out.sequences[row : row + 1, ids.shape[1] :], text[:, length:], f"{kind}, row {row}")
    other = model.generate(input_ids=ids, attention_mask=mask, custom_generate=PlainDecoding(), **SETTINGS, **LOGITS)
    assert (other.logits[0][:2] - out.logits[0][:2]).abs().max() > 0.05, f"{kind}: the second pass changes nothing"
    close(other.logits[0][2:], out.logits[0][2:], f"{kind}: one token is nothing to read twice", tolerance=1e-5)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_share_0_is_the_causal_peft_model(kind):
    model, (ids, mask) = adapted(kind, 0, 0), prompts()
    ours = model.generate(input_ids=ids, attention_mask=mask, **SETTINGS, **LOGITS)
    plain = model.generate(input_ids=ids, attention_mask=mask, custom_generate=None, **SETTINGS, **LOGITS)
    same_tokens(ours.sequences, plain.sequences, kind)
    close(torch.stack(ours.logits), torch.stack(plain.logits), kind, tolerance=1e-5)


def test_share_0_is_bit_for_bit_the_causal_model_read_in_the_same_pieces():
    model, (ids, mask) = adapted("llama", 0, 0), prompts()
    base, split = model.get_base_model(), ids.shape[1] - 1
    out = model.generate(input_ids=ids, attention_mask=mask, **{**SETTINGS, "max_new_tokens": 1}, **LOGITS)
    with torch.no_grad(), reading_with(base, CAUSAL):
        whole, cache = AttentionStructure.causal(mask), DynamicCache()
        for start, stop in ((0, split), (split, split + 1)):
            part = AttentionStructure.causal(mask[:, :stop]).part(start, stop)
            positions = whole.keys.position[:, start:stop].long()
            outputs = base(
                ids[:, start:stop], attention_mask=masks_for(base, part), position_ids=positions, past_key_values=cache
            )
    difference = (outputs.logits[:, -1] - out.logits[0]).abs().max()
    assert difference == 0, f"largest difference {difference:.3g}"


def test_the_mix_is_each_pass_bit_for_bit_at_0_and_1_and_the_average_between():
    model = shared("llama")
    first, both = prefix_caches(model, prompts()[0][:1, :12])
    mix = CacheMix(2)
    for share, expected in ((0.0, first), (1.0, both)):
        mix.fill(share, share)
        for found, layer in zip(mix(first, both).layers, expected.layers, strict=True):
            assert torch.equal(found.keys, layer.keys), f"keys at share {share}"
            assert torch.equal(found.values, layer.values), f"values at share {share}"
    with torch.no_grad():
        mix.keys.copy_(torch.tensor([0.0, -0.03]))  # the sign does not count
    assert mix.shares()[0].tolist() == pytest.approx([0, 0.75])
    found = mix(first, both).layers[1].keys
    close(found, 0.25 * first.layers[1].keys + 0.75 * both.layers[1].keys, "keys of layer 1", tolerance=1e-6)
    with pytest.raises(ValueError, match="a share must be a number from 0 to 1, got 2"):
        mix.fill(2, 0)


def test_share_1_reads_with_the_bidirectional_adapter_alone():
    model, (ids, mask) = adapted("qwen3", 1, 1), prompts()
    out = model.generate(input_ids=ids, attention_mask=mask, **{**SETTINGS, "max_new_tokens": 1}, **LOGITS)
    for row in range(2):
        text = ids[row : row + 1, mask[row].bool()]
        close(out.logits[0][row : row + 1], row_logits(model, text, text.shape[1], 1, 1)[:, -1], f"row {row}", 1e-5)
    # What the causal adapter makes of earlier tokens does not count, and what they are does, in both directions.
    with torch.no_grad():
        for layer in adapter_layers(model):
            for name, parameter in layer.named_parameters():
                if ".bidirectional" in name:
                    parameter.zero_()
    base = model.get_base_model()
    again = model.generate(input_ids=ids[:1], attention_mask=mask[:1], **{**SETTINGS, "max_new_tokens": 1}, **LOGITS)
    with torch.no_grad(), model.disable_adapter():
        structure = AttentionStructure.bidirectional(mask[:1, :-1])
        cache = base(ids[:1, :-1], attention_mask=masks_for(base, structure), past_key_values=DynamicCache())
    rest = AttentionStructure.causal(mask[:1]).part(ids.shape[1] - 1, ids.shape[1])
    with torch.no_grad():
        last = base(
            ids[:1, -1:], attention_mask=masks_for(base, rest), position_ids=rest.queries.position.long(),
            past_key_values=cache.past_key_values,
        )  # fmt: skip
    close(again.logits[0], last.logits[:, -1], "the frozen base read in both directions", tolerance=1e-5)


@pytest.mark.parametrize("inner", [PromptLookup(draft_tokens=4), ContrastiveSearch(penalty_alpha=0.0, top_k=3)])
def test_other_strategies_go_on_from_the_mixed_cache(inner):
    for kind in ("llama", "mistral"):
        model, (ids, mask) = shared(kind), prompts()
        plain = model.generate(input_ids=ids, attention_mask=mask, **{**SETTINGS, "max_new_tokens": 12})
        out = Bitune(decode_with=inner).generate(
            model.get_base_model(), ids, attention_mask=mask, **{**SETTINGS, "max_new_tokens": 12}
        )
        same_tokens(out, plain, f"{kind}, {inner}")


def test_hidden_states_and_attentions_cover_the_whole_prompt():
    model, (ids, mask) = shared("llama"), prompts()
    more = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    model.get_base_model().set_attn_implementation("eager")
    try:
        out = model.generate(input_ids=ids, attention_mask=mask, **SETTINGS, **more)
    finally:
        model.get_base_model().set_attn_implementation("sdpa")
    assert [tuple(state.shape[:2]) for state in out.hidden_states[0]] == [tuple(ids.shape)] * 3
    for attention in out.attentions[0]:
        assert tuple(attention.shape[-2:]) == (21, 21)
        close(attention[0].sum(-1), torch.ones(4, 21), "rows of probabilities", tolerance=1e-5)
        assert attention[0].triu(1).abs().max() == 0  # a row without padding


def test_adapters_and_gradients_are_left_as_they_were():
    model, (ids, mask) = adapted("llama"), prompts()

    def state():
        return [list(layer.active_adapters) for layer in adapter_layers(model)], [
            parameter.requires_grad for parameter in model.parameters()
        ]

    before = state()
    assert sum(before[1]) > 40
    model.generate(input_ids=ids, attention_mask=mask, **SETTINGS)
    assert state() == before
    refusal(lambda: model.generate(**structured.prompts(([2, (2, 2), 2],)), **SETTINGS), "segment_ids", what="a set")
    assert state() == before
    model.set_adapter("bidirectional")  # whatever plain calls use, prompts are read with both
    chosen = model.generate(input_ids=ids, attention_mask=mask, **SETTINGS)
    assert adapter_layers(model)[0].active_adapters == ["bidirectional"]
    same_tokens(chosen, shared("llama").generate(input_ids=ids, attention_mask=mask, **SETTINGS), "another active one")


def test_models_without_adapters_get_clear_errors():
    ids, mask = prompts()

    def run(model):
        return Bitune().generate(model, ids, attention_mask=mask, **SETTINGS)

    refusal(lambda: run(tiny_models.shared("llama")), "no coefficients of the mix", what="a plain model")
    refusal(lambda: run(tiny_models.shared("t5")), "encoder-decoder", what="an encoder-decoder")
    model = adapted("llama")
    with model.disable_adapter():
        refusal(lambda: run(model.get_base_model()), "merged or disabled", what="disabled adapters")
    model.base_model.merge_adapter()
    refusal(lambda: run(model.get_base_model()), "merged or disabled", what="merged adapters")
    model.unmerge_adapter()
    model.delete_adapter("bidirectional")
    refusal(lambda: run(model.get_base_model()), "no adapter called 'bidirectional'", what="a deleted adapter")
    config = LoraConfig(r=2, target_modules="all-linear")
    refusal(lambda: BituneModel(tiny_models.build("mamba"), config), "recurrent state", what="a recurrent model")
    refusal(lambda: BituneModel(tiny_models.build("t5"), config), "decoder-only", what="an encoder-decoder")

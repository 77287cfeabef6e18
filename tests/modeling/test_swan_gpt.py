"""SWAN-GPT: the model contract, and what is particular to this architecture."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_ext.modeling.swan_gpt.configuration_swan_gpt import SwanGPTConfig
from hf_ext.modeling.swan_gpt.modeling_swan_gpt import SwanGPTForCausalLM, log_length_scale
from hf_ext.testing.model import ModelContract
from hf_ext.testing.model_base import assert_close

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class TestSwanGPT(ModelContract):
    model_class = SwanGPTForCausalLM
    invalid_options = (
        ({"hidden_size": 0}, "hidden_size=0 must be a whole number >= 1"),
        ({"hidden_size": 30}, "hidden_size=30 must be a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"sliding_window": 1}, "sliding_window=1 must be a whole number >= 2"),
        ({"global_every": 0}, "global_every=0 must be a whole number >= 1"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers=4"),
        ({"layer_types": ["full_attention", "chunked_attention"] * 2}, r"layer_types has \['chunked_attention'\]"),
        ({"training_length": 1}, "training_length=1 must be at least 2"),
        ({"log_scale_slope": -1.0}, "log_scale_slope=-1.0 must be a number >= 0"),
        ({"attention_dropout": 1.5}, "attention_dropout=1.5 must be"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be True or False"),
        ({"hidden_act": "no-such"}, "hidden_act='no-such' is unknown"),
        ({"rope_parameters": {"rope_type": "no-such"}}, "rope_type='no-such' is unknown"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    )

    def config(self, **options):
        # The test sequences are longer than the window and than the training length.
        return SwanGPTConfig(**{**SHAPE, "sliding_window": 6, "training_length": 10, **options})

    @torch.no_grad()
    def test_left_padding_changes_no_logits_even_without_position_ids(self):
        model, ids = self.make_model(), self.tokens()
        padded = torch.nn.functional.pad(ids, (5, 0))
        mask = (torch.arange(padded.shape[1]) >= 5).long().expand(2, -1)
        full = model(ids).logits
        assert_close(model(padded, attention_mask=mask).logits[:, 5:], full, self.tolerance, "padded and plain logits")
        first = model(padded[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        last = model(padded[:, -1:], attention_mask=mask, past_key_values=first.past_key_values).logits
        assert_close(last, full[:, -1:], self.tolerance, "padded, cached logits and plain ones")

    @torch.no_grad()
    def test_local_layers_cache_no_more_than_the_window(self):
        model, ids = self.make_model(), self.tokens(length=50)
        cache = model(ids, use_cache=True).past_key_values
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        assert lengths == [50, 5, 5, 5], f"cached tokens a layer: {lengths}"

    @torch.no_grad()
    def test_a_local_layer_sees_exactly_the_window(self):
        model, ids = self.make_model(num_hidden_layers=1, layer_types=["sliding_attention"]), self.tokens(batch=1)
        logits = model(ids).logits[0, -1]
        for distance, seen in ((5, True), (6, False)):
            other = ids.clone()
            other[0, -1 - distance] = (other[0, -1 - distance] + 1) % 64
            change = (model(other).logits[0, -1] - logits).abs().max().item()
            assert (change > 1e-4) == seen, f"the token {distance} back changed the last logits by {change:.3g}"

    @torch.no_grad()
    def test_a_global_layer_does_not_know_the_order_of_its_past(self):
        model, ids = self.make_model(num_hidden_layers=1, layer_types=["full_attention"]), self.tokens(batch=1)
        shuffled = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], dim=1)
        last = model(ids).logits[:, -1], model(shuffled).logits[:, -1]
        assert_close(*last, self.tolerance, "last logits after a reordered past")

    @torch.no_grad()
    def test_logits_of_global_layers_are_scaled_beyond_the_training_length_only(self):
        ids = self.tokens()
        with_scale, without = (self.make_model(**options)(ids).logits for options in ({}, {"log_scale_slope": 0.0}))
        assert_close(with_scale[:, :10], without[:, :10], 0.0, "logits up to the training length")
        change = (with_scale[:, 10:] - without[:, 10:]).abs().amax(-1).min().item()
        assert change > 1e-4, f"beyond the training length some logits changed by {change:.3g} only"

    @torch.no_grad()
    def test_scaled_attention_equals_attention_with_scaled_logits(self):
        model, ids = self.make_model(num_hidden_layers=1, layer_types=["full_attention"]), self.tokens(batch=1)
        model.set_attn_implementation("eager")
        attention, seen = model.model.layers[0].self_attn, ids.shape[1]
        weights = model(ids, output_attentions=True).attentions[0][0, :, -1]  # [heads, keys]
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))[0]
        query = attention.q_proj(hidden[-1]).view(4, 8)
        keys = attention.k_proj(hidden).view(seen, 2, 8).repeat_interleave(2, dim=1)
        logits = torch.einsum("hd,khd->hk", query, keys) / math.sqrt(8)
        expected = (logits * math.log(seen) / math.log(10)).softmax(-1)
        assert_close(weights, expected, 1e-6, "attention weights and the softmax of scaled logits")


@pytest.mark.parametrize("options", [{}, {"training_length": 100, "log_scale_slope": 0.3}])
def test_the_config_and_the_model_compute_the_same_scale(options):
    config = SwanGPTConfig(**{"training_length": 16, **options})
    slope = config.log_scale_slope or 1 / math.log(config.training_length)
    tokens = (1, 15, 16, 17, 100, 100_000)
    scale = log_length_scale(torch.tensor(tokens) - 1, config.training_length, slope)
    assert_close(scale, torch.tensor([config.log_scale(n) for n in tokens]), 1e-5, "scales")
    assert config.log_scale(config.training_length) == 1.0


class TestConversion:
    def llama(self, **options):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "initializer_range": 0.3, **options})).eval()
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(weight)
        return model

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"tie_word_embeddings": True},
            {"attention_bias": True, "mlp_bias": True},
            {"head_dim": 12, "num_key_value_heads": 4},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}},
        ],
        ids=["plain", "tied", "biases", "head-dim", "theta", "yarn"],
    )
    @torch.no_grad()
    def test_with_rotary_layers_and_a_wide_window_it_changes_no_bit(self, options):
        llama = self.llama(**options)
        swan = SwanGPTForCausalLM.from_llama(llama, global_every=None, sliding_window=64)
        ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
        for name in ("eager", "sdpa"):
            llama.set_attn_implementation(name)
            swan.set_attn_implementation(name)
            assert_close(swan(ids).logits, llama(ids).logits, 0.0, f"SWAN and Llama logits ({name})")
        made = [model.generate(ids, max_new_tokens=8, do_sample=False) for model in (swan, llama)]
        assert torch.equal(*made), "SWAN and Llama generate different tokens"

    @torch.no_grad()
    def test_it_leaves_the_source_alone_and_keeps_dtype_and_generation_settings(self):
        llama = self.llama(tie_word_embeddings=True).to(torch.bfloat16)
        llama.generation_config.max_new_tokens = 7
        swan = SwanGPTForCausalLM.from_llama(llama)
        before = llama.lm_head.weight.clone()
        swan.get_input_embeddings().weight.zero_()
        assert torch.equal(llama.lm_head.weight, before), "the models share weights"
        assert swan.lm_head.weight.abs().max() == 0, "tied embeddings came apart"
        assert {weight.dtype for weight in swan.parameters()} == {torch.bfloat16}
        assert swan.config.dtype == torch.bfloat16
        assert swan.generation_config.max_new_tokens == 7
        assert swan.model.rotary_emb.inv_freq.dtype == torch.float32

    def test_it_alternates_layers_by_default(self):
        config = SwanGPTForCausalLM.from_llama(self.llama()).config
        assert config.layer_types == ["full_attention", *["sliding_attention"] * 3]
        assert (config.sliding_window, config.training_length, config.max_position_embeddings) == (32, 64, 64)

    def test_it_converts_from_a_folder(self, tmp_path):
        self.llama().save_pretrained(tmp_path)
        assert SwanGPTForCausalLM.from_llama(tmp_path, sliding_window=8).config.sliding_window == 8

    def test_it_refuses_other_architectures_and_options_that_the_weights_decide(self):
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2))
        with pytest.raises(ValueError, match=r"cannot convert GPT2LMHeadModel .*expected a LlamaForCausalLM"):
            SwanGPTForCausalLM.from_llama(gpt2)
        with pytest.raises(ValueError, match="cannot convert LlamaModel"):
            SwanGPTForCausalLM.from_llama(self.llama().model)
        with pytest.raises(ValueError, match="cannot set hidden_size: the weights decide that"):
            SwanGPTForCausalLM.from_llama(self.llama(), hidden_size=64)


def test_saved_folder_names_every_class_whichever_was_saved(tmp_path):
    model = SwanGPTForCausalLM(SwanGPTConfig(**SHAPE))
    expected = {
        "AutoConfig": "configuration_swan_gpt.SwanGPTConfig",
        "AutoModel": "modeling_swan_gpt.SwanGPTModel",
        "AutoModelForCausalLM": "modeling_swan_gpt.SwanGPTForCausalLM",
    }
    for which, saved in (("head", model), ("body", model.model)):
        saved.save_pretrained(tmp_path / which)
        assert SwanGPTConfig.from_pretrained(tmp_path / which).auto_map == expected
        assert {p.name for p in (tmp_path / which).glob("*.py")} == {
            "configuration_swan_gpt.py",
            "modeling_swan_gpt.py",
        }

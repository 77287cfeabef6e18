"""MetaLM keeps the contract of a causal language model."""

import torch
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from hf_ext.adapter import checkpoint_activations
from hf_ext.modeling.metalm.configuration_metalm import MetaLMConfig
from hf_ext.modeling.metalm.modeling_metalm import MetaLMForCausalLM
from hf_ext.modeling.metalm.spans_metalm import outside_spans
from hf_ext.testing.model import ModelContract
from hf_ext.testing.model_base import assert_close

DECODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ENCODER = {
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 12, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SPANS = torch.tensor([[[2, 5], [8, 12]], [[1, 9], [-1, -1]]])


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

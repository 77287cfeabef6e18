"""What a MetaLM refuses, and why."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from hf_ext.modeling.metalm.modeling_metalm import MetaLMForCausalLM
from hf_ext.modeling.metalm.spans_metalm import outside_spans
from hf_ext.testing.model_base import assert_close
from hf_ext.testing.tiny_models import build

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
def test_wrong_spans_are_refused(tiny, spans, message):
    model, batch = tiny.docked(), tiny.ids(1)
    mask = (torch.arange(14) >= 2).long()[None]
    with pytest.raises(ValueError, match=message):
        model(batch, attention_mask=mask, spans=spans)
    with pytest.raises(ValueError, match=message):
        model.generate(batch, attention_mask=mask, spans=spans, max_new_tokens=2, do_sample=False)


def test_labels_inside_a_span_are_refused_and_can_be_masked(tiny):
    model, batch = tiny.docked(), tiny.ids()
    with pytest.raises(ValueError, match=r"\[2, 5\) of row 0 has labels inside, .* outside_spans"):
        model(batch, labels=batch, spans=tiny.SPANS)
    labels = outside_spans(batch, tiny.SPANS)
    assert (labels != -100).sum() == batch.numel() - 3 - 4 - 8
    output = model(batch, labels=labels, spans=tiny.SPANS)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert_close(output.loss, expected, 1e-6, "the loss and the cross-entropy of tokens outside spans")


def test_a_span_longer_than_the_position_table_is_refused(tiny):
    model, batch = tiny.docked(), tiny.ids()
    with pytest.raises(ValueError, match=r"\[0, 13\) of row 0 has 13 tokens, but BertModel has positions for 12"):
        model(batch, spans=torch.tensor([[[0, 13]], [[0, 3]]]))
    encoder = RobertaModel(RobertaConfig(**{**tiny.ENCODER, "pad_token_id": 1}))  # counts positions from 2
    model = MetaLMForCausalLM.from_parts(encoder, build("llama")).eval()
    with pytest.raises(ValueError, match="RobertaModel has positions for 10"):
        model(batch, spans=torch.tensor([[[0, 11]], [[0, 3]]]))
    assert model(batch, spans=torch.tensor([[[0, 10]], [[0, 3]]])).logits.isfinite().all()


def test_an_encoder_of_another_width_than_its_configuration_is_refused(tiny):
    model = tiny.docked()
    model.encoder.encoder.layer[-1].register_forward_hook(lambda *_: torch.zeros(3, 8, 20))
    with pytest.raises(ValueError, match="outputs are 20 wide, but its configuration has hidden_size=24"):
        model(tiny.ids(), spans=tiny.SPANS)


def test_parts_of_another_kind_are_refused(tiny):
    encoder, decoder = BertModel(BertConfig(**tiny.ENCODER)), build("llama")
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


def test_spans_of_a_prompt_read_in_pieces_are_refused(tiny):
    with pytest.raises(ValueError, match="prefill_chunk_size=4 reads a prompt in pieces"):
        tiny.docked().generate(tiny.ids(), spans=tiny.SPANS, prefill_chunk_size=4, max_new_tokens=2)
    with pytest.raises(ValueError, match="needs encoder, which this model lacks"):
        tiny.docked(vision=True, text=False)(tiny.ids(), spans=tiny.SPANS)

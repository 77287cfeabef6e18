"""The model contract itself: it passes a stock architecture and fails models that are broken in one way each."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext.modeling.swan_gpt import modeling_swan_gpt
from hf_ext.modeling.swan_gpt.configuration_swan_gpt import SwanGPTConfig
from hf_ext.modeling.swan_gpt.modeling_swan_gpt import SwanGPTForCausalLM
from hf_ext.testing.isolated import run_without
from hf_ext.testing.model import ModelContract

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


class TestStockLlama(ModelContract):
    """The contract knows nothing of SWAN-GPT: transformers' own Llama keeps it, too."""

    model_class = LlamaForCausalLM
    invalid_options = (({"hidden_size": 33}, "not a multiple of the number of attention"),)

    def config(self, **options):
        return LlamaConfig(**{**SHAPE, "bos_token_id": None, "eos_token_id": None, **options})


class Swan(ModelContract):
    model_class = SwanGPTForCausalLM

    def config(self, **options):
        return SwanGPTConfig(**{**SHAPE, "sliding_window": 6, "training_length": 10, **options})


class IgnoresPadding(SwanGPTForCausalLM):
    def forward(self, *args, attention_mask=None, **kwargs):
        return super().forward(*args, **kwargs)


class CountsPadding(SwanGPTForCausalLM):
    """Takes the place in the padded batch for the position: the length scale comes out wrong."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if attention_mask is not None:
            kept = attention_mask.shape[1] - input_ids.shape[1]
            position_ids = torch.arange(attention_mask.shape[1])[None, kept:]
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


class ForgetsTheCache(SwanGPTForCausalLM):
    def forward(self, *args, past_key_values=None, **kwargs):
        return super().forward(*args, **kwargs)


class ScalesByTheWholeLength(SwanGPTForCausalLM):
    """Scales every query by the length of the sequence it came with, not by what it sees itself."""

    def forward(self, *args, **kwargs):
        per_query = modeling_swan_gpt.log_length_scale
        modeling_swan_gpt.log_length_scale = lambda p, *rest: per_query(p.amax(-1, keepdim=True).expand_as(p), *rest)
        try:
            return super().forward(*args, **kwargs)
        finally:
            modeling_swan_gpt.log_length_scale = per_query


class NeverTied(SwanGPTForCausalLM):
    _tied_weights_keys = None

    def tie_weights(self, *args, **kwargs):
        pass


class LosesABit(SwanGPTForCausalLM):
    def save_pretrained(self, folder, **kwargs):
        state = {name: weight.clone() for name, weight in self.state_dict().items()}
        state["model.norm.weight"][0] += 1e-6
        super().save_pretrained(folder, state_dict=state, **kwargs)


class NotReallyCheckpointing(SwanGPTForCausalLM):
    def _set_gradient_checkpointing(self, enable=True, **kwargs):
        self.model.gradient_checkpointing = enable


class AveragesEachBatch(SwanGPTForCausalLM):
    """Accepts `num_items_in_batch` and does not use it."""

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        return super().forward(input_ids, labels=labels, **kwargs)


class HidesTheWindow(SwanGPTForCausalLM):
    """Does not tell backends about the sliding window, which one without a full mask needs to know."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.sliding_window = None


class OverflowsInBfloat16(SwanGPTForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * (3e38 if output.logits.dtype == torch.bfloat16 else 1)
        return output


class AcceptsAnything(SwanGPTConfig):
    def validate(self):
        pass


@pytest.mark.parametrize(
    ("broken", "test", "message"),
    [
        (IgnoresPadding, "left_padding_changes_no_logits", "padded and plain logits of row 0 differ by up to"),
        (IgnoresPadding, "generate_gives_each_row_of_a_batch_what_it_gets_alone", "tokens differ in a batch"),
        (CountsPadding, "left_padding_changes_no_logits", "padded and plain logits of row 0 differ by up to"),
        (ForgetsTheCache, "cached_decoding_equals_the_full_forward_pass", "logits with the cache.* differ by up to"),
        (ForgetsTheCache, "generate_is_the_argmax_of_the_full_forward_pass", "generate made"),
        (ScalesByTheWholeLength, "cached_decoding_equals_the_full_forward_pass", "logits with the cache.* differ"),
        (NotReallyCheckpointing, "gradient_checkpointing_gives_the_same_gradients", "nothing is recomputed"),
        (HidesTheWindow, "attention_backends_agree", "hf_ext_contract and eager differ by up to"),
        (OverflowsInBfloat16, "bfloat16_is_finite_and_close", "bfloat16 logits are off"),
    ],
)
def test_the_contract_catches(broken, test, message):
    contract = Swan()
    contract.model_class = broken
    with pytest.raises(AssertionError, match=message):
        getattr(contract, f"test_{test}")()


def test_the_contract_catches_what_goes_wrong_with_files(tmp_path):
    contract = Swan()
    contract.model_class = LosesABit
    with pytest.raises(AssertionError, match=r"weights differ by up to 9\.54e-07 after loading"):
        contract.test_saving_and_loading_keeps_every_bit(tmp_path / "bit")
    contract.model_class = NeverTied
    with pytest.raises(AssertionError, match=r"tie_word_embeddings=True, but .* differs by"):
        contract.test_embeddings_are_tied_after_loading_exactly_when_configured(tmp_path / "tied", True)
    contract.model_class = AveragesEachBatch
    with pytest.raises(AssertionError, match="4 rows at once and 4 times one row differ by up to"):
        contract.test_trainer_step_does_not_depend_on_gradient_accumulation(tmp_path / "trainer")
    contract.model_class = SwanGPTForCausalLM
    contract.invalid_options = (({"sliding_window": 1}, "sliding_window"),)
    contract.config = lambda **options: AcceptsAnything(**{**SHAPE, **options})
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        contract.test_wrong_options_are_refused_with_their_name()


def test_the_contract_catches_code_that_needs_the_package(tmp_path):
    with pytest.raises(RuntimeError, match=r"No module named 'hf_ext' \(blocked in this process\)"):
        run_without(["hf_ext"], "import hf_ext", home=tmp_path)


def test_a_difference_of_nan_counts_as_a_difference():
    from hf_ext.testing.model_base import assert_close

    with pytest.raises(AssertionError, match="logits differ by up to nan"):
        assert_close(torch.tensor([float("nan")]), torch.zeros(1), 1.0, "logits")
    with pytest.raises(AssertionError, match=r"logits differ in shape: \(2,\) and \(1,\)"):
        assert_close(torch.zeros(2), torch.zeros(1), 1.0, "logits")


def test_the_length_of_test_sequences_exceeds_the_window():
    contract = Swan()
    contract.config = lambda **_: SimpleNamespace(sliding_window=20)
    assert contract.length() > 40

"""The in-context autoencoder: who reads what, bit for bit where that is promised, and how a batch is read."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType
from transformers import DynamicCache

from hf_ext.cache.soft import ICAEModel, Slots
from hf_ext.generation import PromptLookup
from hf_ext.testing import tiny_models
from hf_ext.testing.strategy_base import close, refusal

TARGETS = {"gpt2": ["c_attn", "c_proj"], "opt": ["q_proj", "v_proj", "fc1"]}
KINDS = ("llama", "gpt2", "opt", "qwen3", "mistral", "gemma3")
CONTEXT, CONTEXT_MASK = tiny_models.prompts((11, 6, 2), seed=3)
IDS, MASK = tiny_models.prompts((5, 3, 1), seed=4)


def built(kind: str = "llama", slots: int = 3, **changes) -> ICAEModel:
    torch.manual_seed(1)
    base = tiny_models.build(kind, **changes)
    config = LoraConfig(r=2, target_modules=TARGETS.get(kind, ["q_proj", "v_proj", "up_proj"]), init_lora_weights=False)
    return ICAEModel(base, config, slots=slots).eval()


def right(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows with their padding on the right."""
    order = (1 - mask).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def by_hand(model: ICAEModel, context: torch.Tensor) -> torch.Tensor:
    """Slots of one row without padding, by a plain call of the PEFT model."""
    base, memory = model.get_base_model(), model.learned.memory[None]
    embeds = torch.cat([base.get_input_embeddings()(context), memory.to(base.dtype)], dim=1)
    return base(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][:, -memory.shape[1] :]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_slots_are_the_last_states_at_the_memory_tokens_whatever_the_padding(kind: str):
    model = built(kind)
    expected = [by_hand(model, row[mask.bool()][None])[0] for row, mask in zip(CONTEXT, CONTEXT_MASK, strict=True)]
    for side, given in (("left", (CONTEXT, CONTEXT_MASK)), ("right", right(CONTEXT, CONTEXT_MASK))):
        slots = model.compress(*given)
        assert slots.mask.all()
        for row, one in enumerate(expected):
            close(slots.vectors[row], one, f"{kind}, padded on the {side}, row {row}", tolerance=2e-5)
    assert float((slots.vectors[0] - slots.vectors[1]).abs().max()) > 0.1


@torch.no_grad()
def test_a_model_that_calls_itself_its_decoder_is_read_below_its_head():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, moe_layers=[], max_position_embeddings=64,
    )  # fmt: skip
    base = tiny_models.fill(Llama4ForCausalLM(config))
    assert base.get_decoder() is base, "transformers says now which part it is; this test has nothing to show"
    model = ICAEModel(
        base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), slots=3
    ).eval()
    slots = model.compress(CONTEXT, CONTEXT_MASK)
    for row, (ids, mask) in enumerate(zip(CONTEXT, CONTEXT_MASK, strict=True)):
        close(slots.vectors[row], by_hand(model, ids[mask.bool()][None])[0], f"row {row}", tolerance=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_after_slots_read_as_embeddings_of_the_untouched_model(kind: str):
    model, plain = built(kind), tiny_models.build(kind)
    slots = model.compress(CONTEXT, CONTEXT_MASK)
    for side, given in (("left", (IDS, MASK)), ("right", right(IDS, MASK))):
        out = model(*given, slots=slots, reconstruct=torch.tensor([False, True, False])).logits
        for row in range(3):
            real = given[1][row].bool()
            asking = [model.learned.reconstruct] if row == 1 else []
            embeds = torch.cat([slots.vectors[row], *asking, plain.get_input_embeddings()(given[0][row][real])])
            expected = plain(inputs_embeds=embeds[None]).logits[0, -int(real.sum()) :]
            close(out[row][real], expected, f"{kind}, padded on the {side}, row {row}", tolerance=2e-5)


@torch.no_grad()
def test_the_decoder_is_the_given_model_bit_for_bit():
    model, plain = built(), tiny_models.build("llama")
    given = {"input_ids": IDS, "attention_mask": MASK}
    assert torch.equal(model(**given).logits, plain(**given).logits)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**given, **settings), plain.generate(**given, **settings))
    with model.decoding():
        assert torch.equal(model.get_base_model()(**given).logits, plain(**given).logits)
    assert not torch.equal(model.get_base_model()(**given).logits, plain(**given).logits), "the adapter does nothing"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen3"])
def test_going_on_from_a_cached_prefix_equals_the_uncached_pass(kind: str):
    model, plain = built(kind), tiny_models.build(kind)
    slots = model.compress(CONTEXT, CONTEXT_MASK)
    prefix = model.prefix(slots)
    assert isinstance(prefix, DynamicCache)
    assert prefix.get_seq_length() == 3
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    inputs = model.continuing(slots, IDS, MASK, cache=copy.deepcopy(prefix))
    cached = plain(**model.continuing(slots, IDS, MASK, cache=copy.deepcopy(prefix))).logits
    close(cached[MASK.bool()], model(IDS, MASK, slots=slots).logits[MASK.bool()], kind, tolerance=2e-5)
    found = plain.generate(**inputs, **settings)  # stock generate of a model that never saw an adapter
    assert torch.equal(found, model.generate(slots=slots, input_ids=IDS, attention_mask=MASK, **settings))
    assert torch.equal(found[:, :5], IDS)
    context = {"context_ids": CONTEXT, "context_mask": CONTEXT_MASK}
    assert torch.equal(found, model.generate(**context, input_ids=IDS, attention_mask=MASK, **settings))
    for row in range(3):  # alone and without padding
        alone = model.generate(slots=slots[row], input_ids=IDS[row][MASK[row].bool()][None], **settings)
        assert torch.equal(alone[0, -5:], found[row, -5:]), f"row {row}"
    assert len(model.generate(slots=slots, input_ids=IDS, attention_mask=MASK, num_beams=2, **settings)) == 3


@torch.no_grad()
def test_other_ways_of_decoding_go_on_from_slots_and_from_their_cache():
    model = built()
    slots = model.compress(CONTEXT, CONTEXT_MASK)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(slots=slots, input_ids=IDS, attention_mask=MASK, **settings)
    lookup = {"custom_generate": PromptLookup(), **settings}
    assert torch.equal(model.generate(**model.continuing(slots, IDS, MASK), **lookup), expected)
    assert torch.equal(model.generate(slots=slots, input_ids=IDS, attention_mask=MASK, **lookup), expected)
    many = model.generate(slots=slots, input_ids=IDS, attention_mask=MASK, num_return_sequences=2, max_new_tokens=4,
                          do_sample=True, pad_token_id=0)  # fmt: skip
    assert many.shape == (6, 9)


@torch.no_grad()
def test_slots_are_saved_joined_and_read_by_another_process(tmp_path):
    model = built()
    slots = model.compress(CONTEXT, CONTEXT_MASK)
    slots.save(tmp_path / "slots.safetensors", text="prompts")
    loaded = Slots.load(tmp_path / "slots.safetensors")
    assert torch.equal(loaded.vectors, slots.vectors)
    both = Slots.join(
        [loaded, Slots(slots.vectors[:, :2], torch.tensor([[True, True], [True, False], [False, False]]))]
    )
    out = model(IDS, MASK, slots=both).logits
    for row, count in enumerate((5, 4, 3)):
        real, one = MASK[row].bool(), Slots(both.vectors[row : row + 1, :count])
        close(out[row][real], model(IDS[row][real][None], slots=one).logits[0], f"row {row}", tolerance=2e-5)


def test_an_adapter_that_repeats_its_context_says_so_without_a_prompt():
    model = built()
    slots = model.compress(CONTEXT, CONTEXT_MASK)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    said = model.generate(slots=slots, reconstruct=True, **settings)
    assert said.shape == (3, 4)
    logits = model(said, slots=slots, reconstruct=torch.ones(3, dtype=torch.bool)).logits
    assert torch.equal(logits[:, :-1].argmax(-1), said[:, 1:])


def test_what_cannot_be_honoured_is_refused():
    model = built("gpt2")
    config = {"r": 2, "target_modules": ["q_proj"]}
    long, none = torch.ones(1, 126, dtype=torch.long), torch.zeros_like(CONTEXT_MASK)
    slots = model.compress(CONTEXT, CONTEXT_MASK)
    for run, words in (
        (lambda: built(slots=0), "positive int"),
        (lambda: ICAEModel(tiny_models.build("t5"), LoraConfig(r=2, target_modules=["q"])), "encoder-decoder"),
        (lambda: ICAEModel(tiny_models.build("llama"), LoraConfig(**config, bias="all")), "bias"),
        (lambda: ICAEModel(tiny_models.build("llama"), PromptTuningConfig(TaskType.CAUSAL_LM, num_virtual_tokens=2)),
         "virtual tokens"),
        (lambda: model.compress(CONTEXT, none), "row 0 of context_ids has no token"),
        (lambda: model.compress(CONTEXT, CONTEXT_MASK[:, 1:]), "expected (3, 11)"),
        (lambda: model.compress(CONTEXT[0]), "(rows, columns)"),
        (lambda: model.compress(long), "need 129 positions, and GPT2LMHeadModel has learned 128"),
        (lambda: model(IDS, MASK, labels=IDS[:, 1:], slots=slots), "labels have the shape (3, 4), expected (3, 5)"),
        (lambda: model(IDS, MASK, slots=slots, context_ids=CONTEXT), "either context_ids or slots"),
        (lambda: model(IDS, MASK, slots=slots[:2]), "2 rows of slots and 3 rows"),
        (lambda: model(IDS, MASK, slots=slots, output_attentions=True), "takes no output_attentions"),
        (lambda: model(IDS, MASK, reconstruct=torch.ones(3)), "give context_ids or slots"),
        (lambda: model(IDS, MASK, slots=Slots(torch.zeros(3, 2, 8))), "made by another model"),
        (lambda: Slots(torch.zeros(3, 2, 8), torch.ones(3, 1)), "one entry a slot"),
    ):  # fmt: skip
        refusal(run, words, what=words)
    model.merge_adapter()
    refusal(lambda: model(IDS, MASK), "merged", what="merged adapters")
    window = built("mistral")
    slots = window.compress(CONTEXT, CONTEXT_MASK)
    refusal(lambda: window.continuing(slots, IDS, MASK), "sliding window", what="padding before a window")

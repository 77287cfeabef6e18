"""What spans do to a MetaLM, in forward passes and in generation."""

import pytest
import torch

from hf_ext.attention.memory import Memories
from hf_ext.generation import (
    PINE,
    ContrastiveSearch,
    ExtendedMind,
    JustReadTwice,
    ParallelEnsemble,
    PromptLookup,
    SetBasedPrompting,
    SpeculativeDecoding,
)
from hf_ext.modeling.metalm.spans_metalm import bounds_of
from hf_ext.testing.model_base import assert_close
from hf_ext.testing.tiny_models import build

# -- what is seen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "opt"])
@torch.no_grad()
def test_without_spans_it_is_the_language_model_bit_for_bit(tiny, kind):
    plain, batch = build(kind), tiny.ids()
    model = tiny.docked(kind)
    for given in ({}, {"spans": torch.full((2, 1, 2), -1)}, {"spans": torch.zeros_like(batch)}):
        ours, theirs = model(batch, labels=batch, **given), plain(batch, labels=batch)
        assert torch.equal(ours.logits, theirs.logits), "logits differ from those of the language model"
        assert torch.equal(ours.loss, theirs.loss)
    made = model.generate(batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(made, plain.generate(batch, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "opt"])
@torch.no_grad()
def test_encoder_outputs_take_the_place_of_embeddings(tiny, kind):
    model, batch = tiny.docked(kind), tiny.ids()
    found = model(batch, spans=tiny.SPANS).logits
    for row, spans in enumerate(([(2, 5), (8, 12)], [(1, 9)])):
        expected = model.language_model(inputs_embeds=tiny.by_hand(model, batch[row], spans)).logits[0]
        assert_close(found[row], expected, tiny.TOLERANCE, f"logits of row {row} in the batch and by hand")
    assert (found - model(batch).logits).abs().max() > 0.1, "spans changed nothing"


@torch.no_grad()
def test_tokens_of_a_span_see_each_other_and_nobody_before_sees_them(tiny):
    model, batch = tiny.docked(), tiny.ids(1)
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
def test_numbers_of_spans_mean_the_same_as_bounds(tiny):
    numbers = torch.zeros(2, 14, dtype=torch.long)
    numbers[0, 2:5], numbers[0, 8:12], numbers[1, 1:9] = 7, 1, 2
    assert bounds_of(numbers).tolist() == tiny.SPANS.tolist()
    model, batch = tiny.docked(), tiny.ids()
    assert torch.equal(model(batch, spans=numbers).logits, model(batch, spans=tiny.SPANS).logits)
    made = [model.generate(batch, spans=spans, max_new_tokens=4, do_sample=False) for spans in (numbers, tiny.SPANS)]
    assert torch.equal(*made)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_logits(tiny, side):
    model, batch = tiny.docked(), tiny.ids()
    alone = [model(batch[:1, :9], spans=tiny.SPANS[:1, :1]).logits[0], model(batch[1:], spans=tiny.SPANS[1:]).logits[0]]
    pad = (5, 0) if side == "left" else (0, 5)
    both = torch.cat([torch.nn.functional.pad(batch[:1, :9], pad), batch[1:]])
    mask = torch.nn.functional.pad(torch.ones(2, 9, dtype=torch.long), pad)
    mask[1] = 1
    spans = torch.tensor([[[2, 5]], [[1, 9]]])
    spans[0] += pad[0]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(both, attention_mask=mask, position_ids=positions, spans=spans).logits
    assert_close(found[0][mask[0].bool()], alone[0], tiny.TOLERANCE, f"logits of the row padded {side} and alone")
    assert_close(found[1], alone[1], tiny.TOLERANCE, "logits of the longer row in the batch and alone")


@pytest.mark.parametrize("backend", ["sdpa", "hf_ext"])
@torch.no_grad()
def test_attention_implementations_agree_on_spans(tiny, backend):
    model, batch = tiny.docked(vision=True), tiny.ids()
    model.set_attn_implementation("eager")
    expected = model(batch, spans=tiny.SPANS).logits
    model.set_attn_implementation(backend)
    assert model.encoder.config._attn_implementation == model.language_model.config._attn_implementation == backend
    assert_close(model(batch, spans=tiny.SPANS).logits, expected, tiny.TOLERANCE, f"logits of {backend} and eager")


# -- generation ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_generation_continues_the_prompt_and_encodes_its_spans_once(tiny):
    model, batch = tiny.docked(), tiny.ids()
    settings = {"max_new_tokens": 7, "do_sample": False}
    made, rows = tiny.encodings(model, lambda: model.generate(batch, spans=tiny.SPANS, **settings))
    assert rows == [3], f"the encoder read {rows} spans; expected the three of the prompt, once"
    expected = model(made[:, :-1], spans=tiny.SPANS).logits[:, -7:].argmax(-1)
    assert torch.equal(made[:, -7:], expected), f"generate made {made[:, -7:]}, not {expected}"
    assert not torch.equal(made, model.generate(batch, **settings)), "spans changed nothing"


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}, {"custom_generate": "contrastive"}],
    ids=str,
)
@torch.no_grad()
def test_a_row_of_a_padded_batch_is_continued_as_alone(tiny, options):
    model, batch = tiny.docked(), tiny.ids()
    if "custom_generate" in options:
        options = {"custom_generate": ContrastiveSearch(top_k=3)}
    both = torch.cat([torch.nn.functional.pad(batch[:1, :9], (5, 0)), batch[1:]])
    mask = (torch.arange(14) >= torch.tensor([[5], [0]])).long()
    spans = torch.tensor([[[7, 10]], [[1, 9]]])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    together = model.generate(both, attention_mask=mask, spans=spans, **settings)[:, -5:]
    alone = [model.generate(batch[:1, :9], spans=tiny.SPANS[:1, :1], **settings)[:, -5:]]
    alone += [model.generate(batch[1:], spans=tiny.SPANS[1:], **settings)[:, -5:]]
    assert torch.equal(together, torch.cat(alone)), f"{together.tolist()} in a batch, {torch.cat(alone).tolist()} alone"


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "opt"])
@torch.no_grad()
def test_architectures_continue_a_row_of_a_padded_batch_as_alone(tiny, kind):
    model, batch = tiny.docked(kind), tiny.ids()
    both = torch.cat([torch.nn.functional.pad(batch[:1, :9], (5, 0)), batch[1:]])
    given = {"attention_mask": (torch.arange(14) >= torch.tensor([[5], [0]])).long()}
    given["spans"] = torch.tensor([[[7, 10]], [[1, 9]]])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = model.generate(both, **given, **settings)[:, -5:]
    alone = [model.generate(batch[:1, :9], spans=tiny.SPANS[:1, :1], **settings)[:, -5:]]
    alone += [model.generate(batch[1:], spans=tiny.SPANS[1:], **settings)[:, -5:]]
    assert torch.equal(together, torch.cat(alone)), f"{together.tolist()} in a batch, {torch.cat(alone).tolist()} alone"


@torch.no_grad()
def test_a_plain_draft_model_drafts_for_a_prompt_with_spans(tiny):
    model, batch = tiny.docked(), tiny.ids(1)
    settings = {"spans": tiny.SPANS[:1], "max_new_tokens": 6, "do_sample": False}
    strategy = SpeculativeDecoding(build("llama", num_hidden_layers=1))
    assert torch.equal(model.generate(batch, custom_generate=strategy, **settings), model.generate(batch, **settings))


@torch.no_grad()
def test_an_encoder_may_have_another_dtype(tiny):
    model, batch = tiny.docked(), tiny.ids()
    full = model(batch, spans=tiny.SPANS).logits
    model.encoder.to(torch.bfloat16)
    found = model(batch, spans=tiny.SPANS).logits
    assert found.dtype == torch.float32
    error = ((found - full).norm() / full.norm()).item()
    assert 0 < error < 0.05, f"logits with an encoder in bfloat16 are off by {error:.3g} of their norm"


@torch.no_grad()
def test_a_second_turn_reads_the_spans_behind_the_cache(tiny):
    model, batch = tiny.docked(), tiny.ids(1)
    spans = tiny.SPANS[:1]
    cache = model(batch[:, :7], spans=spans[:, :1], use_cache=True).past_key_values
    settings = {"spans": spans, "max_new_tokens": 5, "do_sample": False}
    made, rows = tiny.encodings(model, lambda: model.generate(batch, past_key_values=cache, **settings))
    assert rows == [1], f"the encoder read {rows} spans; expected the second one only"
    assert torch.equal(made, model.generate(batch, **settings))
    cache = model(batch[:, :10], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache ends after 10 tokens, inside a span"):
        model.generate(batch, past_key_values=cache, **settings)


@torch.no_grad()
def test_speculation_goes_on_from_spans_as_greedy_search_does(tiny):
    model, said_twice = tiny.docked(), tiny.ids(1, 7).repeat(1, 2)  # lookup drafts from what it says again
    batch = torch.cat([torch.nn.functional.pad(said_twice, (2, 0)), tiny.ids(1, 16)])
    given = {"attention_mask": (batch != 0).long(), "spans": torch.tensor([[[4, 8]], [[1, 9]]])}
    settings = {**given, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    strategy = PromptLookup()
    made, rows = tiny.encodings(model, lambda: model.generate(batch, custom_generate=strategy, **settings))
    assert torch.equal(made, model.generate(batch, **settings))
    assert rows == [2], f"the encoder read {rows} spans; expected those of the prompt, once"


@torch.no_grad()
def test_memories_stay_out_of_the_encoders(tiny):
    model, text, batch = tiny.docked(), tiny.ids(1, 6, seed=2), tiny.ids(1)
    memories = Memories.of(model, text.tolist())
    strategy = ExtendedMind(memories, top_memories=6, min_similarity=-1, positions="before")
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = model.generate(batch, spans=tiny.SPANS[:1], custom_generate=strategy, **settings)
    both = model.generate(torch.cat([text, batch], dim=1), spans=tiny.SPANS[:1] + 6, **settings)
    assert torch.equal(found[:, batch.shape[1] :], both[:, batch.shape[1] + 6 :])


@pytest.mark.parametrize("strategy", [SetBasedPrompting(), PINE(), ParallelEnsemble(), JustReadTwice()], ids=repr)
def test_strategies_that_move_columns_refuse_spans(tiny, strategy):
    """Spans are columns of the prompt as it is; SetBasedPrompting reads options sorted by their tokens."""
    batch = tiny.ids(1).sort(descending=True).values
    segments = {"segment_ids": torch.tensor([[0] * 4 + [1] * 4 + [2] * 4 + [0] * 2])}
    given = {"spans": torch.tensor([[[4, 8]]]), **({} if isinstance(strategy, JustReadTwice) else segments)}
    with pytest.raises(ValueError, match="reads other columns than the prompt's, which have no spans"):
        strategy.generate(tiny.docked(), batch, **given, max_new_tokens=2, do_sample=False)


@torch.no_grad()
def test_a_forward_pass_behind_a_cache_takes_embeddings_in_place_of_spans(tiny):
    model, batch = tiny.docked(), tiny.ids(1)
    full = model(batch, spans=tiny.SPANS[:1]).logits
    cache = model(batch[:, :7], spans=tiny.SPANS[:1, :1], use_cache=True).past_key_values
    rest = tiny.SPANS[:1, 1:] - 7
    with pytest.raises(ValueError, match=r"the cache holds 7 tokens already: .* inputs_embeds=model.embed"):
        model(batch[:, 7:], spans=rest, past_key_values=cache)
    embeds = model.embed(batch[:, 7:], spans=rest)
    found = model(inputs_embeds=embeds, past_key_values=cache).logits
    assert_close(found, full[:, 7:], tiny.TOLERANCE, "logits behind a cache and in one piece")

"""The engine of structured prompts."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hf_ext.attention import AttentionStructure
from hf_ext.generation import ContrastiveSearch, PromptLookup, SetBasedPrompting, SpeculativeDecoding
from hf_ext.generation.structured.prompting import StructuredPrompting
from hf_ext.testing import structured, tiny_models
from hf_ext.testing.strategy_base import close, refusal, same_tokens
from hf_ext.testing.strategy_rows import Recorder

NEW = 8


class SideBySide(StructuredPrompting):
    """The simplest method over the engine."""

    def structure(self, prompt):
        return super().structure(prompt).segments(prompt.segments, prompt.groups)


def greedy(model, inputs, strategy=None, **settings):
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **settings}
    return (strategy or SideBySide()).generate(model, **inputs, **settings)


def new_of(out, inputs):
    return out[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_with_a_cache_equals_decoding_without(kind, attention):
    """Windows of mistral and gemma3 (8 tokens) bind, and count positions; rows are padded."""
    model, inputs = tiny_models.build(kind, attn_implementation=attention), structured.prompts()
    out = greedy(model, inputs, return_dict_in_generate=True, output_logits=True)
    tokens, logits = structured.uncached(model, SideBySide(), inputs, NEW)
    same_tokens(new_of(out.sequences, inputs), tokens, kind)
    close(torch.stack(out.logits, 1), logits, f"{kind}, logits with and without a cache", tolerance=1e-4)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_a_batch_equals_its_rows(kind):
    model, inputs = tiny_models.shared(kind), structured.prompts()
    batch = greedy(model, inputs, return_dict_in_generate=True, output_logits=True)
    for row in range(3):
        alone = structured.row_of(inputs, row)
        single = greedy(model, alone, return_dict_in_generate=True, output_logits=True)
        same_tokens(new_of(batch.sequences, inputs)[row : row + 1], new_of(single.sequences, alone), f"{kind}, {row}")
        close(torch.stack(batch.logits, 1)[row], torch.stack(single.logits, 1)[0], f"{kind}, row {row}", tolerance=1e-4)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_a_prompt_without_segments_is_that_of_generate(kind):
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts()
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 20, "temperature": 1.5}):
        settings |= {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0}
        torch.manual_seed(5)
        expected = model.generate(ids, **settings)
        torch.manual_seed(5)
        same_tokens(model.generate(ids, custom_generate=SideBySide(), **settings), expected, f"{kind}, {settings}")


def test_segments_travel_through_custom_generate_as_through_the_strategy():
    model, inputs = tiny_models.shared("llama"), structured.prompts()
    through = model.generate(
        **inputs, custom_generate=SideBySide(), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    same_tokens(through, greedy(model, inputs), "custom_generate=")
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert not torch.equal(through, greedy(model, plain)), "the segments changed nothing"


def test_several_answers_to_a_prompt_keep_its_segments():
    model, inputs = tiny_models.shared("llama"), structured.prompts()
    out = greedy(model, inputs, do_sample=True, top_k=1, num_return_sequences=2)
    same_tokens(out, greedy(model, inputs).repeat_interleave(2, 0), "the likeliest tokens, twice")
    torch.manual_seed(0)
    out = greedy(model, inputs, do_sample=True, top_k=0, num_return_sequences=2)
    assert not torch.equal(out[0::2], out[1::2]), "both answers to every prompt are the same"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen3"])
def test_other_strategies_go_on_from_the_prompt(kind):
    model, inputs = tiny_models.shared(kind), structured.prompts()
    expected = greedy(model, inputs)
    for inner in (
        PromptLookup(draft_tokens=3),
        SpeculativeDecoding(draft_model=tiny_models.shared("llama"), draft_tokens=3),
        ContrastiveSearch(penalty_alpha=0.0, top_k=3),
        ContrastiveSearch(top_k=1),
    ):
        same_tokens(greedy(model, inputs, SideBySide(decode_with=inner)), expected, f"{kind}, with {inner}")


def test_contrastive_search_of_a_batch_is_that_of_its_rows():
    model, inputs = tiny_models.shared("llama"), structured.prompts()
    search = SideBySide(decode_with=ContrastiveSearch(penalty_alpha=0.5, top_k=4))
    batch = new_of(greedy(model, inputs, search), inputs)
    for row in range(3):
        alone = structured.row_of(inputs, row)
        same_tokens(batch[row : row + 1], new_of(greedy(model, alone, search), alone), f"row {row}")
    assert not torch.equal(batch, new_of(greedy(model, inputs), inputs)), "the penalty changed nothing"


def test_windows_that_bind_with_another_strategy_are_refused_and_wide_ones_are_not():
    strategy, inputs = SideBySide(decode_with=PromptLookup(draft_tokens=2)), structured.prompts()
    refusal(lambda: greedy(tiny_models.shared("mistral"), inputs, strategy), "sliding windows", what="mistral")
    wide = tiny_models.build("mistral", sliding_window=64)
    same_tokens(greedy(wide, inputs, strategy), greedy(wide, inputs), "a window wider than the text")
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    narrow = tiny_models.shared("mistral")
    same_tokens(greedy(narrow, plain, strategy), greedy(narrow, plain), "columns are positions without segments")


def test_rows_end_at_eos_and_the_stream_shows_every_token_once():
    model, inputs = tiny_models.shared("llama"), structured.prompts()
    free = new_of(greedy(model, inputs), inputs)
    eos, streamer = int(free[0, 2]), Recorder()
    strategy = SideBySide()
    out = greedy(model, inputs, strategy, eos_token_id=eos, streamer=streamer)
    assert (new_of(out, inputs)[0, 3:] == 0).all(), f"row 0 went on after eos {eos}: {out[0].tolist()}"
    same_tokens(streamer.sequences(), out, "what was streamed")
    assert strategy.report.tokens_per_row[0] == 3
    lengths = [next((i + 1 for i, t in enumerate(row) if t == eos), NEW) for row in free.tolist()]
    assert strategy.report.tokens_per_row == lengths


def test_the_whole_prompt_takes_one_call_of_the_model():
    model, inputs, strategy = tiny_models.shared("llama"), structured.prompts(), SideBySide()
    _, calls = tiny_models.calls_of(model, lambda: greedy(model, inputs, strategy))
    assert calls == [(3, inputs["input_ids"].shape[1])] + [(3, 1)] * (NEW - 1), calls
    assert strategy.report.target_calls == len(calls)


def test_a_prompt_longer_than_the_context_fits_if_its_segments_share_positions():
    """150 tokens, of which 120 stand side by side in threes, take 70 positions of 128."""
    inputs = structured.prompts(([20, (40, 40, 40), 10],))
    for kind in ("llama", "gpt2"):
        model = tiny_models.shared(kind)
        tokens, _ = structured.uncached(model, SideBySide(), inputs, 4)
        same_tokens(new_of(greedy(model, inputs, max_new_tokens=4), inputs), tokens, kind)
    too_long = structured.prompts(([20, (100, 40), 10],))
    refusal(lambda: greedy(model, too_long), "130 positions", "128", what="a set beyond the context")


def test_new_tokens_beyond_a_table_of_positions_are_refused():
    inputs = structured.prompts(([120],))
    for kind in ("gpt2", "opt"):
        model = tiny_models.shared(kind)
        refusal(lambda model=model: greedy(model, inputs, max_new_tokens=10), "table of 128", what=kind)
        assert greedy(model, inputs, max_new_tokens=9).shape[1] == 129
    assert greedy(tiny_models.shared("llama"), inputs, max_new_tokens=10).shape[1] == 130


def test_what_cannot_be_honoured_is_refused():
    model, inputs = tiny_models.shared("llama"), structured.prompts()
    cases = {
        "segment_ids have the shape": {"segment_ids": inputs["segment_ids"][:, 1:]},
        "group_ids have the shape": {"group_ids": inputs["group_ids"][:2]},
        "above 0 at the same tokens": {"group_ids": torch.zeros_like(inputs["group_ids"])},
        "segment_ids must be whole numbers": {"segment_ids": -inputs["segment_ids"]},
        "group_ids must be whole numbers": {"group_ids": inputs["group_ids"] / 2},
        "in one piece": {"prefill_chunk_size": 4},
        "leave position_ids out": {"position_ids": torch.arange(inputs["input_ids"].shape[1]).expand(3, -1)},
        "a cache that grows": {"cache_implementation": "static"},
        "use_cache=True": {"use_cache": False},
    }
    for words, change in cases.items():
        refusal(lambda change=change: greedy(model, {**inputs, **change}), words, what=words)
    cache = DynamicCache(config=model.config)
    model(inputs["input_ids"], past_key_values=cache)
    refusal(lambda: greedy(model, inputs, past_key_values=cache), "past_key_values", what="a filled cache")
    torn = {**inputs, "segment_ids": inputs["segment_ids"].roll(1, 1), "group_ids": None}
    torn["segment_ids"][0] = torch.tensor([0, 1, 2, 1, *[0] * 16])
    refusal(lambda: greedy(model, torn), "several pieces", what="a segment in pieces")
    sampled = SideBySide(decode_with=ContrastiveSearch())
    refusal(lambda: greedy(model, inputs, sampled, do_sample=True), "deterministic", what="sampling with contrastive")


def test_models_that_keep_no_tokens_are_refused():
    inputs = structured.prompts(([3, (2, 2), 3],))
    for kind in ("mamba", "openai-gpt"):
        refusal(lambda kind=kind: greedy(tiny_models.shared(kind), inputs), "cache", "state", what=kind)


def test_the_reference_sees_what_the_structure_says():
    """Guards the comparison above: without the segments, the reference says something else."""
    inputs = structured.prompts()
    model = tiny_models.shared("llama")
    _, with_sets = structured.uncached(model, SideBySide(), inputs, 1)

    class Causal(StructuredPrompting):
        def structure(self, prompt):
            return AttentionStructure.causal(prompt.mask)

    _, without = structured.uncached(model, Causal(), inputs, 1)
    assert (with_sets[:2] - without[:2]).abs().amax(-1).amax(-1).min() > 1e-2
    close(with_sets[2], without[2], "a row without sets")


def test_what_is_no_strategy_is_refused_as_a_way_to_go_on():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    strategy = SetBasedPrompting(decode_with="greedy")
    with pytest.raises(ValueError, match=r"decode_with must be a strategy, .* got 'greedy'"):
        strategy.generate(model, ids, attention_mask=mask, max_new_tokens=2, do_sample=False)

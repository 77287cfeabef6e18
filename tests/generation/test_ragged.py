"""Batches whose rows grow at different paces: the lanes of the model and the rows of the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, generation
from transformers.generation.streamers import BaseStreamer

from hf_ext import adapter
from hf_ext.generation import CautiousDecoding, DecodingStrategy
from hf_ext.generation.lanes import Lanes
from hf_ext.generation.ragged import RaggedRows
from hf_ext.generation.run import DecodingRun
from hf_ext.testing import tiny_models

STOPS = tuple(range(10, 34))
PAD = tiny_models.PAD


@dataclass
class Drive(DecodingStrategy):
    """A strategy that lets a test drive the run."""

    with_run: Callable[[DecodingRun], None] = lambda run: None

    def decode(self, run):
        self.with_run(run)


def drive(model, with_run, lengths=(9, 4, 2), **settings):
    ids, mask = tiny_models.prompts(lengths)
    settings = {"attention_mask": mask, "max_new_tokens": 50, **settings}
    return Drive(with_run).generate(model, ids, **settings)


def worst(found, model, sequences):
    """Largest difference between logits and those of every sequence alone, without a cache."""
    with torch.no_grad():
        expected = [model(torch.tensor([s]), use_cache=False).logits[0, -1] for s in sequences]
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", [*tiny_models.DECODERS, "qwen2"])
def test_lanes_that_forget_different_numbers_of_tokens_go_on_as_if_alone(kind):
    model = tiny_models.build(kind).double()
    model.set_attn_implementation("sdpa")
    tokens = torch.randint(3, tiny_models.VOCABULARY, (3, 6, 3), generator=torch.Generator().manual_seed(2))
    drops = [(0, 2, 1), (1, 1, 1), (2, 0, 0), (0, 1, 2), (0, 0, 0), (2, 1, 0)]  # of each block of three

    def with_run(run):
        lanes = Lanes(run)
        texts = [row[m.bool()].tolist() for row, m in zip(run.input_ids, run.attention_mask, strict=True)]
        assert worst(lanes.prefill(), model, texts) < 1e-9
        for step, drop in enumerate(drops):
            logits = lanes.forward(tokens[:, step])
            blocks = [[*text, *block] for text, block in zip(texts, tokens[:, step].tolist(), strict=True)]
            assert logits.shape[:2] == (3, 3)
            for i in range(3):
                until = [block[: len(block) - 2 + i] for block in blocks]
                assert worst(logits[:, i], model, until) < 1e-9
            texts = [block[: len(block) - d] for block, d in zip(blocks, drop, strict=True)]
            lanes.rearrange([0, 1, 2], list(drop))
            assert lanes.mask.sum(1).tolist() == [len(text) for text in texts]
            assert lanes.mask.shape[1] == max(map(len, texts)), "padding that all lanes share is cut off"
            assert run.cache.get_seq_length() == lanes.mask.shape[1]

    drive(model, with_run)


def test_lanes_are_copied_dropped_and_put_to_wait():
    model = tiny_models.build("mistral").double()
    model.set_attn_implementation("sdpa")

    def with_run(run):
        lanes = Lanes(run)
        texts = [row[m.bool()].tolist() for row, m in zip(run.input_ids, run.attention_mask, strict=True)]
        lanes.prefill()
        lanes.rearrange([2, 0, 0])
        assert lanes.rows == [2, 0, 0]
        texts = [texts[2], texts[0], list(texts[0])]
        waited = 0
        for step in range(7):
            new = torch.tensor([[20 + step], [40 + step], [60 + step]])
            live = torch.tensor([True, step < 2, True])
            logits = lanes.forward(new, live)[:, -1]
            waited += int(step >= 2)
            for text, token, alive in zip(texts, new[:, 0].tolist(), live.tolist(), strict=True):
                text += [token] if alive else []
            going = live.nonzero()[:, 0].tolist()
            assert worst(logits[going], model, [texts[i] for i in going]) < 1e-9
        lanes.rearrange([1, 0], [waited, 0])
        assert lanes.rows == [0, 2]
        logits = lanes.forward(torch.tensor([[7], [8]]))[:, -1]
        assert worst(logits, model, [[*texts[1], 7], [*texts[0], 8]]) < 1e-9

    drive(model, with_run)


def test_a_lane_that_waits_does_not_run_out_of_the_models_positions():
    model = tiny_models.build("gpt2", n_positions=14)

    def with_run(run):
        lanes = Lanes(run)
        lanes.prefill()
        block = torch.full((2, 3), 20)
        for _ in range(3):
            lanes.forward(block, torch.tensor([False, True]))
        lanes.rearrange([0], [9])
        logits = lanes.forward(block[:1, :1])[:, -1]
        assert worst(logits, model, [[*run.input_ids[0].tolist(), 20]]) < 1e-5

    drive(model, with_run, lengths=(13, 2), max_new_tokens=1)


class Columns(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended += 1


def test_columns_of_a_batch_are_streamed_as_soon_as_every_row_has_them():
    streamer = Columns()

    def with_run(run):
        rows = RaggedRows(run)
        streamer.puts.clear()  # the prompt
        rows.accept(0, torch.tensor([10, 11, 12]), finished=False)
        assert streamer.puts == []
        rows.accept(1, torch.tensor([20, 21]), finished=False)
        assert streamer.puts == [[10, 20], [11, 21]]
        rows.accept(1, torch.tensor([22]), finished=True)
        assert streamer.puts[2:] == [[12, 22]]
        rows.accept(0, torch.tensor([13, 14]), finished=True)
        assert streamer.puts[3:] == [[13, PAD], [14, PAD]]
        rows.finish()

    out = drive(tiny_models.shared("llama"), with_run, lengths=(3, 2), streamer=streamer)
    assert out[:, 3:].tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, PAD, PAD]]
    assert streamer.ended == 1


def test_a_single_row_is_streamed_in_blocks():
    streamer = Columns()

    def with_run(run):
        rows = RaggedRows(run)
        streamer.puts.clear()
        rows.accept(0, torch.tensor([10, 11, 12]), finished=False)
        rows.accept(0, torch.tensor([13]), finished=True)
        rows.finish()

    drive(tiny_models.shared("llama"), with_run, lengths=(3,), streamer=streamer)
    assert streamer.puts == [[10, 11, 12], [13]]


class BiasOfRows(LogitsProcessor):
    """Forbids every row tokens of its own; notes what it saw."""

    def __init__(self, rows, residue_of_row):
        self.allowed = torch.stack(
            [torch.arange(tiny_models.VOCABULARY) % rows == residue_of_row(row) for row in range(rows)]
        )
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids)
        return scores.masked_fill(~self.allowed, -torch.inf)


def test_a_processor_of_the_user_finds_every_row_at_its_number_and_without_gaps():
    ids, mask = tiny_models.prompts((9, 4, 2))
    processor = BiasOfRows(3, lambda row: (row + 1) % 3)
    strategy = CautiousDecoding(max_trials=4, min_trials=3, stop_tokens=STOPS)
    torch.manual_seed(4)
    out = strategy.generate(
        tiny_models.shared("llama"), ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=14,
        logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    for row, tokens in enumerate(out[:, 9:].tolist()):
        assert {token % 3 for token in tokens} == {(row + 1) % 3}
    prompts = ids.tolist()
    for seen in processor.seen:
        assert len(seen) == 3
        [text] = {tuple(text) for text in seen.tolist()}  # copies of one lane
        row = prompts.index(list(text[:9]))
        assert {token % 3 for token in text[9:]} <= {(row + 1) % 3}, "a gap, or a token of another row"


def test_a_repetition_penalty_that_ignores_each_rows_padding_works():
    ids, mask = tiny_models.prompts((9, 4))
    strategy = CautiousDecoding(max_trials=3, min_trials=2, stop_tokens=STOPS)
    settings = {"do_sample": True, "top_k": 1, "max_new_tokens": 14, "repetition_penalty": 5.0}
    model = tiny_models.shared("gpt2")
    found = strategy.generate(model, ids, attention_mask=mask, **settings)
    assert found.tolist() == model.generate(ids, attention_mask=mask, **settings).tolist()


def test_what_cannot_follow_tried_rows_is_refused():
    ids, mask = tiny_models.prompts((9, 4))
    model, strategy = tiny_models.shared("llama"), CautiousDecoding(stop_tokens=STOPS)
    with pytest.raises(ValueError, match=r"ClassifierFreeGuidance.* keeps a state for every row"):
        strategy.generate(model, ids, attention_mask=mask, guidance_scale=1.5, max_new_tokens=4)
    unpadded = tiny_models.build("llama", pad_token_id=None)
    with pytest.raises(ValueError, match="pass pad_token_id"):
        strategy.generate(unpadded, ids, attention_mask=mask, max_new_tokens=4, max_time=60.0)
    embeds = model.get_input_embeddings()(ids).detach()
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
    with pytest.raises(ValueError, match="pass input_ids with an empty cache"):
        strategy.generate(model, inputs_embeds=embeds, attention_mask=mask, max_new_tokens=4, **wanted)


def test_the_adapter_knows_transformers_processors_by_their_names():
    known = {**vars(generation), **vars(generation.logits_process), **vars(generation.stopping_criteria)}
    missing = [name for name in (*adapter._ROW_BLIND, *adapter._ROW_STATE) if name not in known]
    assert not missing, f"transformers has no {missing}"
    temperature = generation.TemperatureLogitsWarper(0.5)
    assert adapter.ignores_row_number(temperature)

    class Mine(generation.TemperatureLogitsWarper):
        pass

    assert not adapter.ignores_row_number(Mine(0.5)), "what a subclass does is not known"
    prefix = generation.PrefixConstrainedLogitsProcessor(lambda row, ids: [row], num_beams=1)
    assert adapter.prefix_function(prefix)(3, None) == [3]
    assert adapter.prefix_function(temperature) is None

"""Windows side by side, and windows that answer each by itself."""

from __future__ import annotations

import pytest
import torch

from hf_ext.generation.parallel_context_windows import ParallelContextWindows
from hf_ext.generation.parallel_ensemble import ParallelEnsemble
from hf_ext.testing import structured, tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import close, refusal, same_tokens
from hf_ext.testing.strategy_rows import Recorder

METHODS = [ParallelContextWindows, ParallelEnsemble]
ONE_SET = ([2, (3, 1, 4), 3], [1, (2, 2), 5], [6])


class TestConformance(StrategyConformance):
    models = ("llama", "gpt2", "mistral")

    def strategy(self):
        return ParallelContextWindows()


def run(strategy, model, inputs, **settings):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    return strategy.generate(model, **inputs, return_dict_in_generate=True, output_logits=True, **settings)


def laws(out):
    return torch.stack(out.logits, 1).log_softmax(-1)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
@pytest.mark.parametrize("method", METHODS)
def test_one_window_is_the_plain_model(kind, method):
    model, inputs = tiny_models.shared(kind), structured.prompts(([2, (5,), 3], [1, (2,), 2], [4]))
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**plain, **settings, return_dict_in_generate=True, output_logits=True)
    out = run(method(), model, inputs)
    same_tokens(out.sequences, expected.sequences, kind)
    close(laws(out), laws(expected), f"{kind}, {method.__name__}", tolerance=1e-4)
    cut = run(method(window=50, query=1, shared=1), model, plain)  # longer than every prompt: one window
    same_tokens(cut.sequences, expected.sequences, f"{kind}, cut by length")


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_windows_does_not_matter(kind, method):
    model = tiny_models.shared(kind)
    every = list(structured.orders(structured.prompts(([2, (3, 1, 4), 3],))))
    found = [laws(run(method(), model, inputs)) for inputs in every]
    assert len(found) == 6
    for other in found[1:]:
        close(other, found[0], f"{kind}, {method.__name__}", tolerance=2e-5)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_windows_with_a_cache_are_those_without(kind):
    model, inputs = tiny_models.shared(kind), structured.prompts(ONE_SET)
    tokens, logits = structured.uncached(model, ParallelContextWindows(), inputs, 6)
    out = run(ParallelContextWindows(), model, inputs)
    same_tokens(out.sequences[:, inputs["input_ids"].shape[1] :], tokens, kind)
    close(torch.stack(out.logits, 1), logits, kind, tolerance=1e-4)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_the_ensemble_is_the_mixture_of_the_windows_laws(kind):
    """By hand: every window as a prompt of its own, their distributions mixed at every step."""
    model, inputs = tiny_models.shared(kind), structured.prompts(([2, (3, 1, 4), 3],))
    segments, ids = inputs["segment_ids"][0], inputs["input_ids"][0]
    for weights in (None, (3.0, 1.0, 0.0)):
        shares = torch.tensor(weights or (1.0, 1.0, 1.0))
        texts = [ids[(segments == 0) | (segments == number)] for number in (1, 2, 3)]
        expected = []
        for _ in range(6):
            each = torch.stack([model(text[None]).logits[0, -1].softmax(-1) for text in texts])
            law = (shares[:, None] * each).sum(0) / shares.sum()
            expected.append(law)
            texts = [torch.cat([text, law.argmax(-1, keepdim=True)]) for text in texts]
        out = run(ParallelEnsemble(weights=weights), model, inputs)
        close(torch.stack(out.logits, 1)[0].exp(), torch.stack(expected), f"{kind}, {weights}", tolerance=1e-5)
        assert out.sequences[0, len(ids) :].tolist() == [int(law.argmax()) for law in expected]


def test_ensembles_of_a_batch_are_those_of_its_rows():
    model, inputs = tiny_models.shared("llama"), structured.prompts(ONE_SET)
    strategy = ParallelEnsemble()
    (batch, calls) = tiny_models.calls_of(model, lambda: run(strategy, model, inputs))
    assert strategy.report.details["windows"] == [3, 2, 1]
    assert [rows for rows, _ in calls] == [6] * 6
    assert strategy.report.target_calls == len(calls)
    assert strategy.report.target_positions == sum(rows * width for rows, width in calls)
    assert batch.past_key_values is None
    for row in range(3):
        single = run(ParallelEnsemble(), model, structured.row_of(inputs, row))
        close(laws(batch)[row], laws(single)[0], f"row {row}", tolerance=1e-4)


def test_ensembles_stream_end_and_sample():
    model, inputs = tiny_models.shared("llama"), structured.prompts(ONE_SET)
    streamer = Recorder()
    out = run(ParallelEnsemble(), model, inputs, streamer=streamer).sequences
    same_tokens(streamer.sequences(), out, "the stream")
    start = inputs["input_ids"].shape[1]
    ended = run(ParallelEnsemble(), model, inputs, eos_token_id=int(out[0, start + 1])).sequences
    assert (ended[0, start + 2 :] == 0).all()
    same_tokens(run(ParallelEnsemble(), model, inputs, do_sample=True, top_k=1).sequences, out, "the likeliest tokens")
    several = run(ParallelEnsemble(), model, inputs, do_sample=True, top_k=1, num_return_sequences=2).sequences
    same_tokens(several, out.repeat_interleave(2, 0), "two answers")


@pytest.mark.parametrize("method", METHODS)
def test_a_context_of_several_times_the_models_length_fits(method):
    ids = torch.randint(3, 90, (1, 300), generator=torch.Generator().manual_seed(0))
    model, mask = tiny_models.shared("gpt2"), torch.ones_like(ids)
    out = run(method(window=70, query=20, shared=2), model, {"input_ids": ids, "attention_mask": mask})
    assert out.sequences.shape == (1, 306)
    refusal(
        lambda: run(method(window=120, query=20, shared=2), model, {"input_ids": ids, "attention_mask": mask}),
        "128", what="windows too long",
    )  # fmt: skip


def test_windows_are_cut_by_length_behind_what_is_shared():
    ids, mask = tiny_models.prompts((11, 4))
    strategy = ParallelContextWindows(window=3, query=2, shared=1)
    by_length = run(strategy, tiny_models.shared("llama"), {"input_ids": ids, "attention_mask": mask})
    segments = torch.tensor([[0, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0], [0] * 8 + [1, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask, "segment_ids": segments}
    by_segments = run(ParallelContextWindows(), tiny_models.shared("llama"), inputs)
    close(laws(by_length), laws(by_segments), "windows by length and by segments", tolerance=0)


@pytest.mark.parametrize("method", METHODS)
def test_what_makes_no_sense_is_refused(method):
    model, inputs = tiny_models.shared("llama"), structured.prompts(ONE_SET)
    refusal(lambda: method(window=0), "window", what="no window")
    refusal(lambda: method(query=0), "query", what="no query")
    refusal(lambda: run(method(window=3), model, inputs), "not both", what="windows twice")
    open_end = structured.prompts(([2, (3, 2)],))
    refusal(lambda: run(method(), model, open_end), "prompt 0 ends in a", what="an open end")


def test_what_an_ensemble_cannot_honour_is_refused():
    model, inputs = tiny_models.shared("llama"), structured.prompts(ONE_SET)
    refusal(lambda: ParallelEnsemble(decode_with=ParallelContextWindows()), "decode_with", what="decode_with")
    refusal(lambda: ParallelEnsemble(weights=(0.0, 0.0)), "weights", what="weights of nothing")
    refusal(lambda: run(ParallelEnsemble(weights=(1, 1, 1)), model, inputs), "3 weights", what="too many weights")
    refusal(lambda: run(ParallelEnsemble(), model, inputs, output_hidden_states=True), "hidden", what="states")
    refusal(lambda: run(ParallelEnsemble(), tiny_models.shared("mamba"), inputs), "recurrent state", what="mamba")
    torn = {**inputs, "segment_ids": inputs["segment_ids"].clone(), "group_ids": None}
    torn["segment_ids"][0, -6:] = torch.tensor([0, 1, 2, 1, 0, 0])
    refusal(lambda: run(ParallelEnsemble(), model, torn), "several pieces", what="a window in pieces")
    gpt2 = tiny_models.shared("gpt2")
    refusal(lambda: run(ParallelEnsemble(), gpt2, inputs, max_new_tokens=200), "table of 128", what="too long a text")

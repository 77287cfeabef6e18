"""Documents that see each other, in the order that attention likes best."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from hf_ext.generation import PromptLookup
from hf_ext.generation.bidirectional_context import BidirectionalContext, documents_of
from hf_ext.generation.structured.prompting import Prompt
from hf_ext.testing import structured, tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import close, refusal, same_tokens

ONE_SET = ([2, (3, 1, 4), 3],)


class TestConformance(StrategyConformance):
    models = ("llama", "gpt2", "mistral")

    def strategy(self):
        return BidirectionalContext(orders=3)


def run(model, inputs, strategy, **settings):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    return strategy.generate(model, **inputs, return_dict_in_generate=True, output_logits=True, **settings)


def laws(out):
    return torch.stack(out.logits, 1).log_softmax(-1)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_documents_see_each_other_and_the_rest_is_causal(kind):
    model, inputs = tiny_models.shared(kind), structured.prompts()
    strategy = BidirectionalContext()
    prompt = Prompt(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["segment_ids"], inputs["group_ids"])
    dense, groups = strategy.structure(prompt).dense()[:, 0], inputs["group_ids"]
    columns = torch.arange(groups.shape[1])
    causal = columns[None, :] <= columns[:, None]
    together = (groups[:, :, None] == groups[:, None]) & (groups[:, None] > 0)
    real = inputs["attention_mask"].bool()
    expected = (causal | together) & real[:, None] & real[:, :, None]
    assert torch.equal(dense, expected)
    tokens, logits = structured.uncached(model, strategy, inputs, 6)
    out = run(model, inputs, strategy)
    same_tokens(out.sequences[:, inputs["input_ids"].shape[1] :], tokens, kind)
    close(torch.stack(out.logits, 1), logits, kind, tolerance=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_order_with_the_highest_peak_is_chosen(kind, bidirectional):
    """By hand: every order alone, with the weights that eager attention returns."""
    model = tiny_models.build(kind, attn_implementation="eager")
    inputs = structured.prompts(ONE_SET)
    strategy = BidirectionalContext(orders=6, bidirectional=bidirectional)
    out = run(model, inputs, strategy)
    expected, peaks = [], []
    for order in structured.orders(inputs):
        single = BidirectionalContext(bidirectional=bidirectional)
        alone = run(model, order, single, output_attentions=True)
        weights = torch.stack([layer[0, :, -1] for layer in alone.attentions[0]]).mean((0, 1))
        peaks.append(float(weights[order["segment_ids"][0] > 0].max()))
        expected.append(laws(alone)[0])
    assert len(set(peaks)) == 6
    found = strategy.report.details["peaks"][0]
    assert found[0] == pytest.approx(peaks[0], abs=1e-5), "the caller's order comes first"
    assert sorted(found) == pytest.approx(sorted(peaks), abs=1e-5)
    best = max(range(6), key=peaks.__getitem__)
    close(laws(out)[0], expected[best], f"{kind}, the best of six orders", tolerance=1e-4)
    same_tokens(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"], "the caller's order")


def test_the_choice_does_not_depend_on_the_callers_order():
    model, found = tiny_models.shared("llama"), []
    for inputs in structured.orders(structured.prompts(ONE_SET)):
        found.append(laws(run(model, inputs, BidirectionalContext(orders=6))))
    for other in found[1:]:
        close(other, found[0], "all orders are tried, whichever comes first", tolerance=1e-4)


def test_rows_of_a_batch_choose_for_themselves():
    model, inputs = tiny_models.shared("llama"), structured.prompts()
    strategy = BidirectionalContext(orders=4)
    (batch, calls) = tiny_models.calls_of(model, lambda: run(model, inputs, strategy))
    assert calls[0] == (12, inputs["input_ids"].shape[1])
    assert strategy.report.target_positions == sum(rows * width for rows, width in calls)
    chosen = strategy.report.details["order"]
    for row in range(3):
        single = BidirectionalContext(orders=4)
        alone = run(model, structured.row_of(inputs, row), single)
        close(laws(batch)[row], laws(alone)[0], f"row {row}", tolerance=1e-4)
        assert single.report.details["order"] == [chosen[row]]
    assert [sorted(order) for order in chosen] == [[1, 2, 3, 4, 5], [1, 2], []]
    assert [len(row) for row in strategy.report.details["peaks"]] == [4, 2, 1], "there are not more orders than that"


def test_speculation_goes_on_from_the_chosen_order():
    model, inputs = tiny_models.shared("llama"), structured.prompts()
    plain = run(model, inputs, BidirectionalContext(orders=4)).sequences
    fast = run(model, inputs, BidirectionalContext(orders=4, decode_with=PromptLookup(draft_tokens=3))).sequences
    same_tokens(fast, plain, "with prompt lookup")


def test_orders_are_different_and_move_whole_documents():
    inputs = structured.prompts(([1, (2, 1, 3, 2), 1, (2, 2), 2],))
    prompt = Prompt(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["segment_ids"], inputs["group_ids"])
    sets = documents_of(prompt, 0)
    orders = [torch.tensor(order) for order in BidirectionalContext(orders=99)._orders(sets, 16)]
    assert torch.equal(orders[0], torch.arange(16)), "the caller's order comes first"
    assert len({tuple(order.tolist()) for order in orders}) == len(orders) == 24 * 2, "all that there are, each once"
    assert len(list(BidirectionalContext(orders=5)._orders(sets, 16))) == 5
    for order in orders:
        moved = inputs["segment_ids"][0][order].tolist()
        runs = [number for number, _ in itertools.groupby(moved) if number]
        assert sorted(runs) == [1, 2, 3, 4, 5, 6], "a document was torn"
        assert torch.equal(inputs["group_ids"][0][order], inputs["group_ids"][0])


def test_what_makes_no_sense_is_refused():
    refusal(lambda: BidirectionalContext(orders=0), "orders", what="no order")
    segments = torch.tensor([[0, 1, 2, 1, 2, 0, 0]])
    inputs = {"input_ids": torch.arange(3, 10)[None], "attention_mask": torch.ones(1, 7), "segment_ids": segments}
    model = tiny_models.shared("llama")
    refusal(lambda: run(model, inputs, BidirectionalContext()), "several pieces", what="documents in pieces")
    whole = structured.prompts(ONE_SET)
    whole["token_type_ids"] = torch.ones_like(whole["input_ids"])
    gpt2 = tiny_models.shared("gpt2")
    refusal(lambda: run(gpt2, whole, BidirectionalContext(orders=2)), "token_type_ids", what="numbers of tokens")
    for states in ("output_hidden_states", "output_attentions"):
        call = partial(run, model, structured.prompts(ONE_SET), BidirectionalContext(orders=2), **{states: True})
        refusal(call, states, what=f"{states} of columns that are moved")
    assert run(gpt2, whole, BidirectionalContext()).sequences.shape[1] == whole["input_ids"].shape[1] + 6


def test_nothing_of_a_prompt_stays_with_the_strategy():
    strategy = BidirectionalContext(orders=2)
    run(tiny_models.shared("llama"), structured.prompts(ONE_SET), strategy)
    assert strategy._prompt is None

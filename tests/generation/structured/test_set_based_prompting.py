"""Set-based prompting: the order of the options cannot matter."""

from __future__ import annotations

import pytest
import torch

from hf_ext.generation import PromptLookup
from hf_ext.generation.set_based_prompting import SetBasedPrompting, canonical_order
from hf_ext.generation.structured.prompting import Prompt
from hf_ext.generation.structured.set_prompt import SetPrompt, encode
from hf_ext.testing import structured, tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import close, refusal, same_tokens

#: One set of two to five options of different lengths.
SETS = ([3, (2, 4), 3], [2, (3, 1, 4), 2], [1, (2, 1, 3, 2), 4], [2, (1, 3, 2, 2, 4), 3])


class TestConformance(StrategyConformance):
    def strategy(self):
        return SetBasedPrompting()


def run(model, inputs, canonical=False, **settings):
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **settings}
    return SetBasedPrompting(canonical=canonical).generate(
        model, **inputs, return_dict_in_generate=True, output_logits=True, **settings
    )


def new_of(out, inputs):
    return out.sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
@pytest.mark.parametrize("parts", SETS, ids=lambda parts: f"{len(parts[1])} options")
def test_all_orders_of_the_options_give_the_same_distributions(kind, parts):
    """Without the canonical order: by the structure alone."""
    model = tiny_models.shared(kind)
    every = list(structured.orders(structured.prompts((parts,))))
    batch = {name: torch.cat([inputs[name] for inputs in every]) for name in every[0]}
    out = run(model, batch)
    laws = torch.stack(out.logits, 1).log_softmax(-1)
    close(laws, laws[:1].expand_as(laws), f"{kind}, {len(every)} orders", tolerance=2e-5)
    assert (laws.argmax(-1) == laws[:1].argmax(-1)).all(), f"{kind}: the likeliest token depends on the order"
    same_tokens(new_of(out, batch), new_of(out, batch)[:1].expand(len(every), -1), f"{kind}, texts")
    same_tokens(out.sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"], "the caller's order")
    plain = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -1].log_softmax(-1)
    assert (plain - plain[:1]).abs().max() > 0.05, f"{kind}: the order matters to nobody, so this test says nothing"


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_in_canonical_order_not_a_bit_differs(kind):
    model, found = tiny_models.shared(kind), []
    for inputs in structured.orders(structured.prompts((SETS[2],))):
        out = run(model, inputs, canonical=True)
        same_tokens(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"], "the caller's order")
        found.append(torch.stack(out.logits, 1))
    assert len(found) == 24
    different = sum(not torch.equal(logits, found[0]) for logits in found)
    assert different == 0, f"{kind}: {different} of 24 orders differ in some bit"
    by_structure = torch.stack(run(model, inputs).logits, 1)
    close(found[0], by_structure, f"{kind}, canonical order against the caller's", tolerance=1e-4)


@pytest.mark.parametrize("canonical", [False, True])
def test_one_option_is_plain_decoding(canonical):
    for kind in tiny_models.DECODERS:
        model, inputs = tiny_models.shared(kind), structured.prompts(([2, (3,), 2, (4,), 2], [1, (2,), 1]))
        plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(**plain, **settings, return_dict_in_generate=True, output_logits=True)
        out = run(model, inputs, canonical, **settings)
        same_tokens(out.sequences, expected.sequences, kind)
        # Exactly the structure of plain attention; a mask of its own may take another kernel than none.
        close(torch.stack(out.logits), torch.stack(expected.logits), kind, tolerance=1e-5)
        structure = SetBasedPrompting().structure(
            Prompt(plain["input_ids"], plain["attention_mask"].bool(), inputs["segment_ids"], inputs["group_ids"])
        )
        causal = type(structure).causal(plain["attention_mask"])
        assert torch.equal(structure.dense(), causal.dense())
        assert torch.equal(structure.queries.position, causal.queries.position)


def test_an_option_does_not_see_its_siblings_but_what_follows_sees_all():
    model, inputs = tiny_models.shared("llama"), structured.prompts(([2, (3, 3), 2],))
    out = structured.uncached(model, SetBasedPrompting(canonical=False), inputs, 1)[1]
    for column in range(2, 8):
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][0, column] += 1
        other = structured.uncached(model, SetBasedPrompting(canonical=False), changed, 1)[1]
        assert (other - out).abs().max() > 1e-3, f"the suffix does not see column {column}"
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 2:5] += 1  # the first option
    states = []
    for given in (inputs, changed):
        prompt = Prompt(given["input_ids"], given["attention_mask"].bool(), given["segment_ids"], given["group_ids"])
        structure = SetBasedPrompting().structure(prompt)
        states.append(
            model(
                given["input_ids"], attention_mask=structure.dense(), position_ids=structure.queries.position.long(),
                output_hidden_states=True,
            ).hidden_states[-1]
        )  # fmt: skip
    assert torch.equal(states[0][:, 5:8], states[1][:, 5:8]), "the second option sees the first"


def test_batches_and_speculative_decoding_are_independent_of_order():
    model, tokenizer = tiny_models.shared("llama"), tiny_models.tokenizer()
    prompts = [SetPrompt("is ", ["ab", "cde", "f"], " it? "), SetPrompt(["xyz", "w"], ["1", "22"], " = ")]
    texts = []
    for which in (prompts, [prompts[0].reordered([2, 0, 1]), prompts[1].reordered([1, 0]).reordered([1, 0], which=1)]):
        inputs = encode(tokenizer, which)
        for inner in (None, PromptLookup(draft_tokens=4)):
            out = SetBasedPrompting(decode_with=inner).generate(model, **inputs, max_new_tokens=12, do_sample=False)
            texts.append(out[:, inputs["input_ids"].shape[1] :])
    for other in texts[1:]:
        same_tokens(other, texts[0], "another order, or with prompt lookup")


def test_canonical_order_sorts_within_sets_only():
    ids = torch.tensor([[0, 9, 5, 4, 3, 8, 2, 2, 1, 7]])
    mask = torch.tensor([[0] + [1] * 9]).bool()
    segments = torch.tensor([[0, 0, 1, 1, 2, 3, 4, 5, 5, 0]])
    groups = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2, 0]])
    order = canonical_order(Prompt(ids, mask, segments, groups))
    assert ids[0, order[0]].tolist() == [0, 9, 3, 5, 4, 2, 2, 1, 8, 7]
    assert canonical_order(Prompt(ids[:, order[0]], mask, segments[:, order[0]], groups[:, order[0]])) is None


def test_a_prompt_that_ends_in_a_set_is_refused():
    model = tiny_models.shared("llama")
    refusal(lambda: run(model, structured.prompts(([3, (2, 2)],))), "prompt 0 ends in a set", what="an open end")
    run(model, structured.prompts(([3, (2,)],)))  # one option is no set


def test_segments_in_pieces_are_refused_in_canonical_order_too():
    model, inputs = tiny_models.shared("llama"), structured.prompts(([1, (2, 2), 2],))
    torn = {**inputs, "segment_ids": torch.tensor([[0, 2, 1, 2, 1, 0, 0]])}
    for canonical in (False, True):
        refusal(lambda canonical=canonical: run(model, torn, canonical), "several pieces", what="overlapping spans")


def test_states_of_reordered_columns_are_refused():
    model, inputs = tiny_models.shared("llama"), structured.prompts(([1, (2, 2), 2],))
    reversed_inputs = list(structured.orders(inputs))[1]
    cases = [case for case in (inputs, reversed_inputs) if canonical_order(_prompt(case)) is not None]
    assert len(cases) == 1
    refusal(lambda: run(model, cases[0], True, output_hidden_states=True), "output_hidden_states", what="states")
    assert len(run(model, cases[0], False, output_hidden_states=True).hidden_states) == 3


def _prompt(inputs):
    return Prompt(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["segment_ids"], inputs["group_ids"])

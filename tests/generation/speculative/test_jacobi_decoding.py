"""Jacobi decoding: a block of guesses, corrected all at once."""

from __future__ import annotations

import pytest
import torch

from hf_ext.generation.jacobi_decoding import GUESSES, JacobiDecoding
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.drafts_from_text import assert_laws
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import same_tokens


class TestConformance(StrategyConformance):
    def strategy(self):
        return JacobiDecoding(block_tokens=5)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate(kind):
    exactness.assert_greedy_identity(lambda model: JacobiDecoding(block_tokens=6), kinds=(kind,))


def test_sampled_text_follows_the_law_of_generate():
    assert_laws(lambda model: JacobiDecoding(block_tokens=3))


def by_definition(model, ids: torch.Tensor, tokens: int, block: int) -> tuple[list[int], list[int]]:
    """Iterate x <- argmax p(. | x) over whole blocks, without a cache; return the text and when each token was fixed.

    The prompt's call gives the first token. After an iteration, all places up to the first that has
    changed are final; one more is, whose place was evaluated behind final tokens only.
    """
    text = [int(model(ids).logits[0, -1].argmax())]
    fixed, iteration = [0], 0
    carried: list[int] = []
    while len(text) < tokens:
        x = (carried + [text[-1]] * block)[:block]
        carried, done = [], 0
        while done < block and len(text) < tokens:
            iteration += 1
            row = torch.cat([ids[0], torch.tensor(text + x[done:])])[None]
            said = model(row).logits[0].argmax(-1).tolist()[-(block - done) - 1 :]
            right = 0
            while right < block - done and said[right] == x[done + right]:
                right += 1
            text += said[: right + 1]
            fixed += [iteration] * (right + 1)
            x[done:] = said[:-1]
            if done + right + 1 == block:
                carried = said[-1:]  # the call has also guessed the first place of the next block
            done += right + 1
    return text[:tokens], fixed[:tokens]


@pytest.mark.parametrize("block", [1, 4, 7])
def test_iterations_are_those_of_the_definition(block):
    model, (ids, mask) = tiny_models.shared("gpt2"), tiny_models.prompts((9,))
    strategy = JacobiDecoding(block_tokens=block)
    ours = strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=0)
    with torch.no_grad():
        text, fixed = by_definition(model, ids, 40, block)
    same_tokens(ours[:, 9:], torch.tensor([text]), f"blocks of {block}")
    # Near max_length the engine drafts less than a block, which changes nothing that is kept.
    found = strategy.report.details["fixed_in"]
    assert found == [fixed], f"tokens were fixed in the iterations {found}, by definition in {fixed}"


@pytest.mark.parametrize("initial", GUESSES)
def test_never_more_calls_than_tokens_and_never_more_than_a_block_has_places(initial):
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    strategy = JacobiDecoding(block_tokens=4, initial=initial)
    strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=40)
    report = strategy.report
    assert report.target_calls <= 40, report
    for fixed, guessed in zip(report.details["fixed_in"], report.details["guessed_in"], strict=True):
        assert len(fixed) == len(guessed) == 40
        assert fixed == sorted(fixed), f"a token was fixed before the one before it: {fixed}"
        assert set(fixed) == set(range(fixed[-1] + 1)), f"an iteration fixed nothing: {fixed}"
        assert all(early <= late for early, late in zip(guessed, fixed, strict=True)), (guessed, fixed)


def test_iterations_of_rows_that_end_early_are_those_of_their_tokens():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    free = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=30)[:, ids.shape[1] :]
    strategy = JacobiDecoding(block_tokens=6)
    eos = [int(free[0, 0]), int(free[1, 9])]
    strategy.generate(
        model, ids, attention_mask=mask, do_sample=False, max_new_tokens=30, eos_token_id=eos, pad_token_id=0
    )
    report = strategy.report
    assert report.tokens_per_row[0] == 1, "the row was meant to end with its first token"
    assert [len(fixed) for fixed in report.details["fixed_in"]] == report.tokens_per_row
    alone = JacobiDecoding(block_tokens=6)
    alone.generate(model, ids[:1], attention_mask=mask[:1], do_sample=False, max_new_tokens=30)
    together = JacobiDecoding(block_tokens=6)
    together.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=30)
    assert alone.report.details["fixed_in"][0] == together.report.details["fixed_in"][0], "rows depend on each other"


@pytest.mark.parametrize("options", [{"block_tokens": 0}, {"initial": "random"}], ids=str)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        JacobiDecoding(**options)

"""How long a chain gets: the arithmetic of its worth, and texts that it leaves as they are."""

from __future__ import annotations

import pytest
import torch

from hf_ext.generation import BanditSpec
from hf_ext.generation.speculative.context import Outcome
from hf_ext.generation.speculative.stopping import ESTIMATE, POSITION_COST, TOKENS_A_CALL, ByConfidence, ByWorth
from hf_ext.generation.speculative_decoding import LONGEST, SpeculativeDecoding
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy_base import refusal


def outcome(accepted: int) -> Outcome:
    return Outcome(list(range(accepted)), [0] * (accepted + 1), [], [])


class TestByConfidence:
    def test_every_lane_gets_a_first_token_and_stops_by_itself(self):
        rule = ByConfidence(0.5)
        assert rule.goes_on(0, [0.1, 0.9]) == [True, True]
        assert rule.goes_on(1, [0.1, 0.5]) == [False, True]


class TestByWorth:
    def test_a_position_must_be_worth_the_tokens_that_its_cost_gives_elsewhere(self):
        rule = ByWorth(draft_cost=0.0)
        rule.begin(1)
        price = POSITION_COST * TOKENS_A_CALL
        assert rule.goes_on(0, [0.01]) == [True]  # the first one anyway
        rule.begin(1)
        rule.goes_on(0, [0.5])
        assert rule.goes_on(1, [(price + 1e-9) / 0.5]) == [True]
        rule.begin(1)
        rule.goes_on(0, [0.5])
        assert rule.goes_on(1, [(price - 1e-9) / 0.5]) == [False]

    def test_a_call_must_be_worth_what_it_is_likely_to_bring(self):
        for cost, expected in ((0.1, True), (0.3, False)):
            rule = ByWorth(cost)
            rule.begin(2)
            rule.goes_on(0, [0.5, 0.3])
            likely = 0.8 * (ESTIMATE + 0.5 + 0.3) / 3
            assert rule.reads_on() is expected, (likely, (cost + 2 * POSITION_COST) * TOKENS_A_CALL)

    def test_a_draft_model_that_is_too_modest_is_trusted_more(self):
        rule = ByWorth(0.1)
        for _ in range(20):
            rule.begin(1)
            for place in range(4):
                rule.goes_on(place, [0.5])
            rule.learn([outcome(4)])
        assert rule.expected == pytest.approx(1 + 20 * 4 * 0.5)
        assert rule.rejected == 1  # nothing has been
        rule.begin(1)
        assert all(rule.goes_on(place, [0.5]) == [True] for place in range(20))

    def test_rejections_count_where_the_tokens_above_were_accepted(self):
        rule = ByWorth(0.1)
        rule.begin(2)
        for place, peaks in enumerate(([0.9, 0.8], [0.7, 0.6], [0.9, 0.9])):
            assert rule.goes_on(place, peaks) == [True, True]
        rule.learn([outcome(3), outcome(1)])
        assert rule.expected == pytest.approx(1 + (0.1 + 0.3 + 0.1) + (0.2 + 0.4))
        assert rule.rejected == 2
        assert rule.tokens == TOKENS_A_CALL + 4 + 2
        assert rule.cost == pytest.approx(1 + 1 + POSITION_COST * 7 + 0.1 * 3)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
def test_greedy_text_is_that_of_generate(kind):
    draft = exactness.perturbed(tiny_models.shared(kind), 0.15)
    exactness.assert_greedy_identity(lambda model: SpeculativeDecoding(draft, "auto"), kinds=(kind,))


@pytest.mark.parametrize("cost", [0.0, 0.3])
def test_sampled_text_follows_the_law_of_generate(cost):
    model = exactness.small_vocabulary(vocabulary=5)
    draft = exactness.perturbed(model, 0.6)
    exactness.assert_sampling_law(
        lambda model: SpeculativeDecoding(draft, "auto", draft_cost=cost), model, draws=5000,
        prompt=torch.tensor([[3, 1, 2, 1]]), temperature=0.7,
    )  # fmt: skip


def drafted(draft, cost: float, **settings) -> float:
    """Return the tokens drafted a step, in a batch."""
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    strategy = SpeculativeDecoding(draft, "auto", draft_cost=cost)
    strategy.generate(model, ids, attention_mask=mask, max_new_tokens=80, min_new_tokens=80, pad_token_id=0, **settings)
    report = strategy.report
    return report.target_positions / report.target_calls / len(ids) - 1


def test_a_good_draft_model_drafts_far_and_a_bad_one_hardly():
    model, other = tiny_models.shared("llama"), exactness.perturbed(tiny_models.shared("llama"), 0.6)
    good, bad = drafted(model, 0.05, do_sample=False), drafted(other, 0.05, do_sample=False)
    dear = drafted(other, 0.6, do_sample=False)
    assert LONGEST / 2 < good <= LONGEST, good
    assert dear <= bad < good / 2, (dear, bad, good)


def test_the_same_seed_gives_the_same_text():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    draft, texts = exactness.perturbed(model, 0.3), []
    for _ in range(2):
        torch.manual_seed(3)
        strategy = SpeculativeDecoding(draft, "auto")
        texts.append(
            strategy.generate(model, ids, attention_mask=mask, do_sample=True, max_new_tokens=24, pad_token_id=0)
        )
    assert texts[0].tolist() == texts[1].tolist()


def test_it_may_be_an_arm_of_several():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    draft = exactness.perturbed(model, 0.15)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 30, "pad_token_id": 0}
    strategy = BanditSpec(arms=[SpeculativeDecoding(draft, "auto"), SpeculativeDecoding(draft, 2)])
    assert strategy.generate(model, ids, **settings).tolist() == model.generate(ids, **settings).tolist()
    assert min(strategy.report.details["pulls"]) > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draft_tokens": "much"}, 'from 0 on or "auto"'),
        ({"draft_tokens": "auto", "confidence": 0.5}, "confidence must be 0"),
        ({"draft_tokens": 5, "draft_cost": 0.1}, 'for draft_tokens="auto"'),
        ({"draft_tokens": "auto", "draft_cost": -1}, "a number from 0 on"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, said):
    refusal(lambda: SpeculativeDecoding(tiny_models.shared("llama"), **options), said, what=str(options))

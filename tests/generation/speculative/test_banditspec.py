"""BanditSpec: drafters and lengths chosen by what they bring."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hf_ext.generation.aded import ADED
from hf_ext.generation.banditspec import EXP3, UCB, BanditSpec
from hf_ext.generation.jacobi_decoding import JacobiDecoding
from hf_ext.generation.prompt_lookup import PromptLookup
from hf_ext.generation.spectr import SpecTr
from hf_ext.generation.speculative_contrastive_decoding import SpeculativeContrastiveDecoding
from hf_ext.generation.speculative_decoding import SpeculativeDecoding
from hf_ext.generation.token_recycling import TokenRecycling
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.drafts_from_text import assert_laws
from hf_ext.testing.strategy import StrategyConformance


def draft(kind: str = "llama"):
    return exactness.perturbed(tiny_models.shared(kind), 0.15)


def mixed(model, other):
    """Arms of all kinds: with and without a model, one model shared by two, drawn and chosen drafts."""
    return (
        SpeculativeDecoding(other, 1),
        SpeculativeDecoding(other, 3),
        SpecTr(other, draft_tokens=2),
        PromptLookup(3),
        TokenRecycling(nodes=6),
        ADED(nodes=6),
        JacobiDecoding(3),
    )


class TestConformance(StrategyConformance):
    def strategy(self):
        return BanditSpec(draft_model=draft())


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_greedy_text_is_that_of_generate_with_arms_of_all_kinds(kind):
    exactness.assert_greedy_identity(lambda model: BanditSpec(arms=mixed(model, draft(kind))), kinds=(kind,))


def test_sampled_text_follows_the_law_of_generate():
    others = {size: exactness.small_vocabulary(vocabulary=size, seed=1) for size in (4, 6)}
    assert_laws(lambda model: BanditSpec(arms=mixed(model, others[model.config.vocab_size]), algorithm="exp3"), 0.5)


def test_each_arm_keeps_its_own_acceptance_rule():
    """A draft model that is the target is always right under the rule that knows its law, under others it is not."""
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    arms = (SpeculativeDecoding(model, 3), SpecTr(model, sequences=2, draft_tokens=3))
    strategy = BanditSpec(arms=arms, exploration=10.0)
    torch.manual_seed(0)
    strategy.generate(model, ids, attention_mask=mask, do_sample=True, max_new_tokens=33, min_new_tokens=33)
    assert min(strategy.report.details["pulls"]) > 0
    assert strategy.report.details["mean_accepted"] == 3.0, strategy.report


def regret(bandit, means: list[float], rounds: int, seed: int) -> list[float]:
    """Return the regret after each round where arm i pays 1 with probability `means[i]`."""
    rng, total, found = random.Random(1000 + seed), 0.0, []
    for _ in range(rounds):
        arm = bandit.choose()
        bandit.learn(arm, float(rng.random() < means[arm]))
        total += max(means) - means[arm]
        found.append(total)
    return found


@pytest.mark.parametrize("make", [lambda arms, seed: UCB(arms), EXP3], ids=["ucb", "exp3"])
def test_regret_grows_slower_than_the_rounds_and_the_best_arm_is_found(make):
    means = [0.3, 0.7, 0.5, 0.2]
    curves, shares = [], []
    for seed in range(10):
        bandit = make(len(means), seed)
        curves.append(regret(bandit, means, 4000, seed))
        shares.append(bandit.pulls[1] / 4000)
    early, late = (sum(curve[at - 1] for curve in curves) / 10 for at in (400, 4000))
    power = math.log10(late / early)  # 1 would be linear
    assert power < 0.8, f"regret grows as rounds to the power {power:.2f}: {early:.1f} after 400, {late:.1f} after 4000"
    assert sum(shares) / 10 > 0.75, f"the best arm was pulled in {sum(shares) / 10:.2f} of the rounds"


def test_an_arm_that_was_unlucky_at_first_is_tried_again():
    """With one bonus for all arms, whatever their own pulls, the second arm would never get another chance."""
    bandit = UCB(2)
    for arm, reward in ((0, 1.0), (1, 0.2)):
        assert bandit.choose() == arm
        bandit.learn(arm, reward)
    pulls = []
    for _ in range(200):
        pulls.append(bandit.choose())
        bandit.learn(pulls[-1], (0.6, 1.0)[pulls[-1]])
    assert pulls.count(1) > 150, f"the better arm got {pulls.count(1)} of 200 rounds"


def test_bounds_of_ucb_are_those_of_its_docstring():
    bandit = UCB(3, exploration=2.0)
    bandit.pulls, bandit.totals, bandit.scale = [5, 3, 2], [20.0, 9.0, 2.0], 6.0
    bounds = [
        total / pulls + 2 * 6 * math.sqrt(math.log(10) / pulls)
        for total, pulls in ((20.0, 5), (9.0, 3), (2.0, 2))
    ]  # fmt: skip
    assert bandit.choose() == bounds.index(max(bounds)) == 2


def test_estimated_losses_of_exp3_are_unbiased():
    """Averaged over the draw, what an arm is charged is its loss."""
    bandit = EXP3(3)
    bandit.pulls, bandit.scale, bandit._losses = [4, 4, 4], 1.0, [1.0, 2.0, 4.0]
    chances, rewards = bandit.chances(), (0.9, 0.5, 0.1)
    assert chances[0] > chances[1] > chances[2]
    assert sum(chances) == pytest.approx(1)
    for arm in range(3):
        charged = EXP3(3)
        charged.pulls, charged.scale, charged._losses = [4, 4, 4], 1.0, [1.0, 2.0, 4.0]
        charged.learn(arm, rewards[arm])
        added = [new - old for new, old in zip(charged._losses, (1.0, 2.0, 4.0), strict=True)]
        assert chances[arm] * added[arm] == pytest.approx(1 - rewards[arm])
        assert sum(added) == added[arm]


def test_the_arm_that_drafts_best_is_taken_most():
    model, (ids, mask) = tiny_models.build("llama"), tiny_models.prompts()
    unrelated = tiny_models.build("llama", num_hidden_layers=1, rms_norm_eps=0.5)
    with torch.no_grad():
        unrelated.lm_head.weight.neg_()
    for algorithm in ("ucb", "exp3"):
        arms = (SpeculativeDecoding(unrelated, 3), SpeculativeDecoding(model, 3))
        strategy = BanditSpec(arms=arms, algorithm=algorithm, reward="tokens")
        strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=100)
        details = strategy.report.details
        assert sum(details["pulls"]) == details["steps"]
        assert details["pulls"][1] > 2 * details["pulls"][0], f"{algorithm}: {details['pulls']}"
        assert details["mean_reward"][1] > details["mean_reward"][0]


def test_arms_share_a_draft_model_and_what_it_has_read():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    other = draft()
    strategy = BanditSpec(arms=tuple(SpeculativeDecoding(other, n) for n in (1, 2, 3)), exploration=10.0)
    _, calls = tiny_models.calls_of(
        other, lambda: strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=30)
    )
    prompts = [n for _, n in calls if n >= ids.shape[1]]
    assert len(prompts) <= 1, f"the draft model read the prompts {len(prompts)} times"
    pulls = strategy.report.details["pulls"]
    assert min(pulls) > 0
    assert strategy.report.draft_calls <= sum(n * count for n, count in zip((1, 2, 3), pulls, strict=True)) + 1


def test_what_was_learned_is_kept_on_request_only():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    for keep in (False, True):
        strategy, pulls = BanditSpec(keep=keep), []
        for _ in range(2):
            strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
            pulls.append(sum(strategy.report.details["pulls"]))
        assert (pulls[1] > pulls[0]) == keep, f"keep={keep}: {pulls} rounds"
    for arms in ((PromptLookup(),), (PromptLookup(), TokenRecycling(), PromptLookup(3))):
        strategy.arms = arms  # of which nothing has been learned
        strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
        assert len(strategy.report.details["pulls"]) == len(arms)


def test_draft_models_may_be_named_by_their_folder_and_then_are_loaded_once(tmp_path):
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    draft().save_pretrained(tmp_path)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    reports = []
    for named in (draft(), str(tmp_path)):
        strategy = BanditSpec(draft_model=named)
        strategy.generate(model, ids, **settings)
        reports.append((strategy.report.details["pulls"], strategy.report.draft_calls))
    assert reports[0] == reports[1]


def test_arms_of_another_law_are_refused():
    with pytest.raises(ValueError, match="law"):
        BanditSpec(arms=(SpeculativeContrastiveDecoding(draft()),))


@pytest.mark.parametrize(
    "options",
    [{"arms": ()}, {"arms": ("a",)}, {"algorithm": "greedy"}, {"reward": "joy"}, {"exploration": -1.0}],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BanditSpec(**options)
    with pytest.raises(ValueError, match="either"):
        BanditSpec(draft_model=draft(), arms=(PromptLookup(),))

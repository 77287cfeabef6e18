"""The task on which MEAP's claims are checked is the task that its description says."""

import itertools

import torch

from hf_ext.claims import meap


def test_each_row_hides_one_needle_in_a_chain_of_words_and_asks_for_it():
    rows = meap.haystacks(64, seed=0)
    assert rows.shape == (64, meap.LENGTH)
    assert torch.equal(rows, meap.haystacks(64, seed=0))
    followers = torch.randint(0, meap.HAY, (meap.HAY, 3), generator=torch.Generator().manual_seed(12345))
    for row in rows:
        hay, (ask, answer) = row[: -2 * meap.QUESTIONS], row[-2:].tolist()
        assert row[-2 * meap.QUESTIONS :].tolist() == [ask, answer] * meap.QUESTIONS
        needles = hay[hay >= meap.FIRST_NEEDLE]
        assert needles.tolist() == [answer]
        assert ask == meap.ASK
        words = hay[hay < meap.ASK] - 1
        assert all(later in followers[earlier] for earlier, later in itertools.pairwise(words))


def test_an_untrained_model_finds_needles_at_the_rate_of_chance_or_less():
    found, loss = meap.figures(meap.small_model(0))
    assert found < 0.2
    assert loss > 3  # ln 34 = 3.5


def test_training_computes_as_many_operations_with_meap_as_without():
    assert meap.flop_ratio().value == 1

"""The task on which MEAP's claims are checked is the task that its description says."""

import itertools

import torch

from hf_ext.claims import meap
from hf_ext.trainer_callbacks import MEAP


def test_each_row_hides_a_needle_of_each_kind_in_a_chain_of_words_and_asks_for_every_kind():
    rows = meap.haystacks(64, seed=0)
    assert rows.shape == (64, meap.LENGTH)
    assert torch.equal(rows, meap.haystacks(64, seed=0))
    followers = torch.randint(0, meap.HAY, (meap.HAY, 3), generator=torch.Generator().manual_seed(12345))
    for row in rows:
        hay = row[: -meap.QUESTIONS]
        rounds = row[-meap.QUESTIONS :].view(meap.ROUNDS, meap.KINDS, 2).tolist()
        needles = sorted(hay[hay >= meap.FIRST_NEEDLE].tolist())
        assert [(needle - meap.FIRST_NEEDLE) // meap.NEEDLES for needle in needles] == list(range(meap.KINDS))
        expected = [[meap.FIRST_QUESTION + kind, needle] for kind, needle in enumerate(needles)]
        assert all(sorted(asked) == expected for asked in rounds)
        words = hay[hay < meap.FIRST_QUESTION] - 1
        assert len(words) == meap.WORDS
        assert all(later in followers[earlier] for earlier, later in itertools.pairwise(words))


def test_an_untrained_model_finds_needles_at_the_rate_of_chance_or_less():
    found, loss = meap.figures(meap.small_model(0))
    assert found < 0.2
    assert loss > 4  # ln 85 = 4.4


def test_only_the_answers_of_the_first_round_count():
    answers = [meap.WORDS + meap.KINDS + 1 + 2 * kind for kind in range(meap.KINDS)]

    def knowing_all_of(columns):
        """Stand in for a model: right about the tokens in these columns, wrong about all others."""

        def model(rows, labels):
            logits = torch.zeros(*rows.shape, meap.VOCABULARY)
            logits[..., meap.MASK] = 1
            for column in columns:
                logits[torch.arange(len(rows)), column - 1, rows[:, column]] = 2
            return type("Outputs", (), {"logits": logits, "loss": torch.tensor(0.0)})

        return model

    others = [column for column in range(1, meap.LENGTH) if column not in answers]
    assert meap.figures(knowing_all_of(answers))[0] == 1
    assert meap.figures(knowing_all_of(answers[:1]))[0] == 1 / meap.KINDS
    assert meap.figures(knowing_all_of(others))[0] == 0


def test_watching_the_learning_curve_does_not_change_the_training(monkeypatch):
    monkeypatch.setattr(meap, "EVERY", 2)
    curve = meap.LearningCurve()
    watched = meap.train(MEAP(meap.MASK_RATIO, mask_token_id=meap.MASK), 0, 4, curve)
    alone = meap.train(MEAP(meap.MASK_RATIO, mask_token_id=meap.MASK), 0, 4)
    assert len(curve.found) == len(curve.losses) == 2
    assert (curve.found[-1], curve.losses[-1]) == meap.figures(watched)  # nothing was masked in the test
    for left, right in zip(watched.state_dict().values(), alone.state_dict().values(), strict=True):
        difference = float((left - right).abs().max())
        assert difference == 0, difference


def test_training_computes_as_many_operations_with_meap_as_without():
    assert meap.flop_ratio().value == 1

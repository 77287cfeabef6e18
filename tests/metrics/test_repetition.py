"""Repetition and diversity against figures counted by hand and against numpy."""

import math
import random

import numpy as np
import pytest

from hf_ext.metrics import distinct_n, rep_n, repetition_diversity, zipf_coefficient
from hf_ext.metrics.repetition import longest_loop, ngrams


@pytest.mark.parametrize("period", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_rep_n_of_a_loop_has_its_closed_form(period, n):
    # A loop over `period` different tokens has exactly `period` different n-grams, whatever n is.
    length = 40
    tokens = [i % period for i in range(length)]
    assert rep_n(tokens, n) == pytest.approx(1 - period / (length - n + 1), abs=1e-12)


def test_text_without_a_repeated_ngram_has_no_repetition_and_full_diversity():
    measured = repetition_diversity([list(range(50))])
    assert [measured[f"rep_{n}"] for n in (2, 3, 4)] == [0, 0, 0]
    assert measured["diversity"] == 1
    assert measured["loop"] == 0


def test_diversity_is_the_product_counted_by_hand():
    # "a b a b": bigrams ab ba ab (2 of 3), trigrams aba bab (2 of 2), one 4-gram (1 of 1).
    # "c c c c c": 4, 3 and 2 n-grams of which one each is distinct.
    measured = repetition_diversity(["a b a b", "c c c c c"])
    assert measured["rep_2"] == pytest.approx(1 - 3 / 7)
    assert measured["rep_3"] == pytest.approx(1 - 3 / 5)
    assert measured["rep_4"] == pytest.approx(1 - 2 / 3)
    assert measured["diversity"] == pytest.approx(3 / 7 * 3 / 5 * 2 / 3)
    assert measured["diversity_per_text"] == pytest.approx([2 / 3, 1 / 4 * 1 / 3 * 1 / 2])
    assert measured["seq_rep_4"] == pytest.approx((0 + 1 / 2) / 2)
    assert measured["distinct_1"] == pytest.approx(3 / 9)
    assert measured["distinct_2"] == pytest.approx(3 / 7)


def test_figures_summed_over_a_batch_weigh_texts_by_their_ngrams_and_ignore_their_order():
    rng = random.Random(0)
    texts = [[rng.randrange(6) for _ in range(rng.randrange(5, 60))] for _ in range(12)]
    together = repetition_diversity(texts)
    shuffled = repetition_diversity(texts[::-1])
    alone = [repetition_diversity([text]) for text in texts]
    assert together["diversity_per_text"] == [one["diversity"] for one in alone]
    assert together["diversity_per_text"] == shuffled["diversity_per_text"][::-1]
    for key in ("rep_2", "rep_3", "rep_4", "diversity", "distinct_2", "zipf"):
        assert together[key] == shuffled[key], key
    for n in (2, 3, 4):
        weights = [len(ngrams(text, n)) for text in texts]
        pooled = sum(w * one[f"rep_{n}"] for w, one in zip(weights, alone, strict=True)) / sum(weights)
        assert together[f"rep_{n}"] == pytest.approx(pooled, abs=1e-12)


def test_distinct_n_falls_when_texts_repeat_each_other_while_rep_n_does_not():
    one, many = ["a b c d e"], ["a b c d e"] * 4
    assert repetition_diversity(one)["rep_2"] == repetition_diversity(many)["rep_2"] == 0
    assert distinct_n([text.split() for text in many], 2) == pytest.approx(1 / 4)


@pytest.mark.parametrize("exponent", [1, 2])
def test_zipf_recovers_the_exponent_of_an_exact_power_law(exponent):
    counts = [3600 // rank**exponent for rank in range(1, 7)]  # 3600 is divisible by all of them
    tokens = [rank for rank, count in enumerate(counts) for _ in range(count)]
    assert zipf_coefficient([tokens]) == pytest.approx(exponent, abs=1e-12)


def test_zipf_agrees_with_a_least_squares_fit_of_numpy_on_random_counts():
    rng = random.Random(1)
    tokens = [int(rng.paretovariate(1.2)) for _ in range(2000)]
    counts = sorted((tokens.count(token) for token in set(tokens)), reverse=True)
    slope, _ = np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)
    difference = abs(zipf_coefficient([tokens]) + slope)
    assert difference < 1e-9, f"differs from numpy by {difference}"


def test_loop_at_the_end_counts_only_what_repeats():
    assert longest_loop([9, 8, 7, 1, 2, 1, 2, 1]) == 3
    assert longest_loop([1, 2, 1, 2, 1, 2, 9]) == 0
    assert longest_loop([5] * 10) == 9


def test_token_ids_and_the_words_of_the_same_text_give_the_same_figures():
    ids = [[0, 1, 2, 0, 1, 3], [4, 4, 4, 4]]
    text = [" ".join("abcde"[i] for i in row) for row in ids]
    assert repetition_diversity(ids) == repetition_diversity(text)


def test_text_shorter_than_the_order_gives_nan_and_not_zero():
    measured = repetition_diversity(["a b"])
    assert measured["rep_2"] == 0
    assert math.isnan(measured["rep_3"])
    assert math.isnan(measured["diversity"])


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no texts"),
        ("one string", {}, r"write \[text\]"),
        (["fine", "   "], {}, r"at \[1\] hold no token"),
        (["fine"], {"orders": (0,)}, "positive"),
    ],
)
def test_input_that_makes_no_sense_is_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        repetition_diversity(texts, **options)

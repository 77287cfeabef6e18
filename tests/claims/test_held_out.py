"""The helpers of the claim checks on text, and the exact claims on tiny models."""

import random

import pytest
import torch

from hf_ext.claims import held_out
from hf_ext.claims.cautious_decoding import first_line


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for trial in range(200):
        low, high = held_out.bootstrap([rng.gauss(1.0, 1.0) for _ in range(24)], draws=400, seed=trial)
        hits += low <= 1.0 <= high
    assert 175 <= hits <= 199, f"{hits} of 200 intervals of 95 % cover the mean"


def test_bootstrap_is_repeatable_and_narrows_with_more_values():
    values = [0.1, 0.5, 0.9, 0.3]
    assert held_out.bootstrap(values) == held_out.bootstrap(values)
    narrow, wide = held_out.bootstrap(values * 16), held_out.bootstrap(values)
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 2


def test_halves_of_a_function_give_the_function_and_belong_to_its_body():
    source = (
        "x = 1\n\ndef f(a):\n    '''Doc.'''\n    b = a\n    c = b\n    d = c\n    return d\n\ndef short():\n    pass\n"
    )
    [prompt] = held_out.halves("m.py", source)
    assert prompt.name == "m.py:f"
    assert prompt.text + prompt.reference == source[source.index("def f") : source.index("\n\ndef short") + 1]
    assert not prompt.text.endswith("\n")
    assert prompt.reference.startswith("\n")


def test_running_with_seeds_leaves_the_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = held_out.per_seed(lambda: torch.rand(2), (0, 1, 0))
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(torch.rand(3), expected)


def test_prompts_without_their_padding_are_what_went_in():
    inputs = {"input_ids": torch.tensor([[9, 9, 1], [2, 3, 4]]), "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]])}
    assert held_out.prompt_ids(inputs) == [[1], [2, 3, 4]]


@pytest.mark.parametrize(
    ("text", "line"), [("\n    return x\n\n", "return x"), ("a = 1", "a = 1"), ("\n\n  b  \nc", "b"), ("  \n", "")]
)
def test_first_line_is_the_first_that_holds_anything(text, line):
    assert first_line(text) == line

"""What a strategy prints: its options, and of a model no more than its class and size."""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_ext.generation.speculative_decoding import SpeculativeDecoding
from hf_ext.generation.strategy import DecodingStrategy
from hf_ext.testing import tiny_models


@dataclasses.dataclass
class Several(DecodingStrategy):
    """As a third party would write one."""

    models: Any = ()
    top_k: int = 4
    hidden: int = dataclasses.field(default=1, repr=False)

    def decode(self, run):
        raise NotImplementedError


@dataclasses.dataclass
class Further(Several):
    name: str = "x"


@dataclasses.dataclass
class Own(Several):
    def __repr__(self):
        return "my own"


def test_of_a_model_its_class_and_size_are_shown():
    model = tiny_models.shared("llama")
    shown = repr(SpeculativeDecoding(draft_model=model, draft_tokens=3))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert shown.startswith(
        f"SpeculativeDecoding(draft_model=<{type(model).__name__}, {millions:.2g} M parameters>, draft_tokens=3"
    )
    assert "\n" not in shown
    assert len(shown) < 200


def test_models_in_a_sequence_are_shown_likewise():
    model = tiny_models.shared("llama")
    shown = repr(Several(models=[model, (model,)]))
    assert shown.count(f"<{type(model).__name__}, ") == 2
    assert "\n" not in shown


def test_other_options_are_shown_as_a_dataclass_shows_them():
    assert repr(Several()) == "Several(models=(), top_k=4)"
    assert repr(Further(models="a", name="y")) == "Further(models='a', top_k=4, name='y')"
    assert str(Several(models=(1,))) == "Several(models=(1,), top_k=4)"


def test_a_strategy_may_have_a_representation_of_its_own():
    assert repr(Own()) == "my own"


def test_a_subclass_keeps_the_representation_of_its_parent():
    @dataclasses.dataclass
    class Child(Own):
        pass

    assert repr(Child()) == "my own"

"""How the text of `--set name=value` becomes a value."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from hf_ext.cli.options import REQUIRED, options_of, parse_settings, type_name, value_of
from hf_ext.cli.output import CliError


@dataclass
class Options:
    """Options of every kind.

    Args:
        count: how many,
            on two lines.
        words: which (a list).
    """

    count: int = 1
    words: list[str] = field(default_factory=lambda: ["a"])
    model: Any = None


class Plain:
    def __init__(self, draft_model, /, ratio: float, *, name: str = "x", **rest: object) -> None: ...


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, "4", 4),
        (int, "-4", -4),
        (float, "0.6", 0.6),
        (float, "1e-3", 1e-3),
        (float, "3", 3.0),
        (str, "none", "none"),
        (str, "", ""),
        (bool, "true", True),
        (bool, "No", False),
        (int | None, "none", None),
        (int | None, "7", 7),
        (int | float, "7", 7),
        (int | float, "0.5", 0.5),
        (float | str, "auto", "auto"),
        (float | str, "2", 2.0),
        (tuple[int, ...], "1,2, 3", (1, 2, 3)),
        (tuple[int, ...], "(1,)", (1,)),
        (tuple[int, ...], "", ()),
        (tuple[int, str], "1,b", (1, "b")),
        (list[str], "[a, 'b']", ["a", "b"]),
        (list[int | str], '[",", 7, ";"]', [",", 7, ";"]),
        (list[str], "7", ["7"]),
        (frozenset[int], "{3,3}", frozenset({3})),
        (Collection[int] | None, "5,6", (5, 6)),
        (Literal["cosine", 2], "cosine", "cosine"),
        (Literal["cosine", 2], "2", 2),
        (Any, "0.5", 0.5),
        (Any, "cosine", "cosine"),
        (REQUIRED, "True", True),
    ],
)
def test_values_are_read_by_their_type(annotation: Any, text: str, value: Any) -> None:
    found = value_of("name", text, annotation)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text", "expected"),
    [
        (int, "abc", "option name expects int, got 'abc'"),
        (int, "4.5", "option name expects int, got '4.5'"),
        (int, "", "option name expects int, got ''"),
        (float, "much", "option name expects float, got 'much'"),
        (bool, "2", "option name expects bool, got '2'"),
        (int | None, "abc", "option name expects int | None, got 'abc'"),
        (tuple[int, ...], "1,b", r"option name expects tuple[int, ...], got '1,b'"),
        (tuple[int, str], "1", r"option name expects tuple[int, str], got '1'"),
        (Literal["cosine"], "dot", "option name expects Literal['cosine'], got 'dot'"),
        (Callable[[int], int], "f", "option name expects Callable[[int], int], got 'f'"),
        (Options, "f", "option name expects Options, got 'f'"),
    ],
)
def test_a_value_of_the_wrong_type_names_option_and_type(annotation: Any, text: str, expected: str) -> None:
    with pytest.raises(CliError) as error:
        value_of("name", text, annotation)
    assert str(error.value) == expected


def test_options_come_from_the_signature_with_their_help() -> None:
    assert [option.as_dict() for option in options_of(Options)] == [
        {"name": "count", "type": "int", "default": "1", "help": "how many, on two lines."},
        {"name": "words", "type": "list[str]", "default": "['a']", "help": "which (a list)."},
        {"name": "model", "type": "any", "default": "None", "help": ""},
    ]
    assert [(o.name, o.default) for o in options_of(Plain)] == [("ratio", REQUIRED), ("name", "x")]


def test_settings_become_keywords() -> None:
    assert parse_settings(["count=3", "words=x=y,z"], Options, "it") == {"count": 3, "words": ["x=y", "z"]}
    assert parse_settings([], Options, "it") == {}


@pytest.mark.parametrize(
    ("settings", "cls", "expected"),
    [
        (["count"], Options, "--set count: expected option=value"),
        (["=3"], Options, "--set =3: expected option=value"),
        (["count=1", "count=2"], Options, "--set count is given twice"),
        (["cont=1"], Options, "it has no option 'cont'; did you mean 'count'? it has count, words, model"),
        (["zzz=1"], Options, "it has no option 'zzz'; it has count, words, model"),
        ([], Plain, "it needs --set ratio=..."),
    ],
)
def test_settings_that_cannot_be_taken_say_what_can(settings: list[str], cls: type, expected: str) -> None:
    with pytest.raises(CliError) as error:
        parse_settings(settings, cls, "it")
    assert str(error.value) == expected


def test_type_names_are_short() -> None:
    assert type_name(Options | None) == "Options | None"
    assert type_name("PreTrainedModel") == "PreTrainedModel"


@dataclass
class Base:
    """A base.

    Args:
        width: how wide.
        depth: how deep.
    """

    width: int = 1
    depth: int = 2


@dataclass
class Derived(Base):
    """Says one thing anew.

    Args:
        width: how wide it really is.
    """


def test_what_a_class_does_not_say_of_an_option_its_base_does():
    assert [option.help for option in options_of(Derived)] == ["how wide it really is.", "how deep."]

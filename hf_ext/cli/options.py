"""Options of a plugin's class: which there are, and how the text of `--set name=value` becomes a value."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union

from hf_ext.cli.output import CliError

REQUIRED = inspect.Parameter.empty
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_SEQUENCES = (tuple, list, set, frozenset, collections.abc.Sequence, collections.abc.Collection, collections.abc.Set)


@dataclasses.dataclass(frozen=True)
class Option:
    """One keyword that a plugin's class takes."""

    name: str
    annotation: Any
    default: Any
    help: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return it as text, for tables and JSON."""
        default = "required" if self.default is REQUIRED else repr(self.default)
        return {"name": self.name, "type": type_name(self.annotation), "default": default, "help": self.help}


def options_of(cls: type) -> list[Option]:
    """Return the options of a class in the order of its signature; of a model's configuration only its own.

    What the class does not say of an option that it inherits, the base does.

    Example:
        >>> @dataclasses.dataclass
        ... class Search:
        ...     '''A search.
        ...
        ...     Args:
        ...         top_k: how many candidates.
        ...     '''
        ...     top_k: int = 4
        >>> options_of(Search)[0].as_dict()
        {'name': 'top_k', 'type': 'int', 'default': '4', 'help': 'how many candidates.'}
    """
    hints, texts = _hints(cls), _argument_texts(inspect.getdoc(cls) or "")
    for base in cls.__mro__[1:-1]:  # what a class inherits and says nothing of
        texts = {**_argument_texts(inspect.cleandoc(base.__doc__ or "")), **texts}
    inherited = _inherited_from_config(cls)
    return [
        Option(p.name, hints.get(p.name, p.annotation), _default(cls, p), texts.get(p.name, ""))
        for p in inspect.signature(cls).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in inherited
    ]


def parse_settings(settings: Sequence[str], cls: type, owner: str) -> dict[str, Any]:
    """Turn `["top_k=4", ...]` into keyword arguments of `cls`.

    Args:
        settings: what stood after each `--set`.
        cls: the class that takes the options.
        owner: how error messages call it.

    Raises:
        CliError: a setting is not `name=value`, the option is unknown or given twice, or the value
            is not of its type.
    """
    options = {option.name: option for option in options_of(cls)}
    known = ", ".join(options) or "none"
    values: dict[str, Any] = {}
    for name, text in split_settings(settings).items():
        if name not in options:
            raise CliError(f"{owner} has no option {name!r}; {nearest(name, options)}it has {known}")
        values[name] = value_of(name, text, options[name].annotation)
    missing = [name for name, option in options.items() if option.default is REQUIRED and name not in values]
    if missing:
        raise CliError(f"{owner} needs {', '.join(f'--set {name}=...' for name in missing)}")
    return values


def split_settings(settings: Sequence[str]) -> dict[str, str]:
    """Split `name=value` texts.

    Raises:
        CliError: one has no `=`, or a name comes twice.
    """
    values: dict[str, str] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise CliError(f"--set {setting}: expected option=value")
        if name in values:
            raise CliError(f"--set {name} is given twice")
        values[name] = text
    return values


def value_of(name: str, text: str, annotation: Any) -> Any:
    """Parse `text` as a value of type `annotation`.

    Raises:
        CliError: it is none; the message names the option and the type.

    Example:
        >>> value_of("top_k", "4", int | None), value_of("ends", "1,2", tuple[int, ...])
        (4, (1, 2))
    """
    try:
        return _parse(text, annotation)
    except (LookupError, ValueError, TypeError):
        raise CliError(f"option {name} expects {type_name(annotation)}, got {text!r}") from None


def type_name(annotation: Any) -> str:
    """Write a type the way users read it.

    Example:
        >>> type_name(int), type_name(float | None), type_name(REQUIRED)
        ('int', 'float | None', 'any')
    """
    if annotation is REQUIRED or annotation is Any:
        return "any"
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", str(annotation))


def _parse(text: str, annotation: Any) -> Any:
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _parse_union(text, members)
    if origin is typing.Annotated:
        return _parse(text, members[0])
    if origin is Literal:
        return {str(value): value for value in members}[text]
    if (origin or annotation) in _SEQUENCES:
        return _parse_sequence(text, origin or annotation, members)
    if annotation is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError
        return text.lower() in _TRUE
    if annotation in (int, float, str):
        return annotation(text)
    if annotation is type(None):
        if text.lower() not in ("none", "null"):
            raise ValueError
        return None
    if annotation is REQUIRED or annotation is Any:
        return literal(text)
    raise ValueError(f"a {type_name(annotation)} cannot be written on a command line")


def literal(text: str) -> Any:
    """Read JSON where `text` is JSON, Python's spelling of the constants, and else plain text.

    Example:
        >>> literal("0.5"), literal("True"), literal("[1, 2]"), literal("cosine")
        (0.5, True, [1, 2], 'cosine')
    """
    constants = {"True": True, "False": False, "None": None}
    if text in constants:
        return constants[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _parse_union(text: str, members: Sequence[Any]) -> Any:
    # The narrow readings first: "none" and "3" are also strings, "3" is also a float.
    order = (type(None), int, float, bool)
    for member in sorted(members, key=lambda m: order.index(m) if m in order else (9 if m is str else 5)):
        try:
            return _parse(text, member)
        except (LookupError, ValueError, TypeError):
            continue
    raise ValueError


def _parse_sequence(text: str, kind: Any, members: Sequence[Any]) -> Any:
    items = _items(text)
    fixed = kind is tuple and members and members[-1] is not Ellipsis
    if fixed and len(items) != len(members):
        raise ValueError
    inner = members if fixed else [members[0] if members else Any] * len(items)
    values = [_parse(item, member) for item, member in zip(items, inner, strict=True)]
    return kind(values) if kind in (list, set, frozenset) else tuple(values)


def _items(text: str) -> list[str]:
    """Split a JSON list, or words between commas."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return [item.strip().strip("'\"") for item in text.strip("()[]{}").split(",") if item.strip()]
    return (
        [item if isinstance(item, str) else json.dumps(item) for item in found] if isinstance(found, list) else [text]
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"did you mean 'top_k'? "` for the nearest of the known names, or nothing.

    Example:
        >>> nearest("topk", ["top_k", "penalty_alpha"])
        "did you mean 'top_k'? "
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _hints(cls: type) -> dict[str, Any]:
    """Annotations with names resolved; those that exist for type checkers only stay text."""
    source: Any = cls if dataclasses.is_dataclass(cls) else inspect.getattr_static(cls, "__init__")
    try:
        return typing.get_type_hints(source)
    except NameError:
        return {p.name: p.annotation for p in inspect.signature(cls).parameters.values()}


def _default(cls: type, parameter: inspect.Parameter) -> Any:
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            if field.name == parameter.name and field.default_factory is not dataclasses.MISSING:
                return field.default_factory()
    return parameter.default


def _inherited_from_config(cls: type) -> set[str]:
    """Names that every transformers configuration has, which tell nothing about this one."""
    base = next((base for base in cls.__mro__ if base.__name__ in ("PreTrainedConfig", "PretrainedConfig")), None)
    return set() if base is None or base is cls else set(inspect.signature(base).parameters)


def _argument_texts(doc: str) -> dict[str, str]:
    """Read the `Args:` section of a docstring, where several names may share a text.

    Example:
        >>> _argument_texts("Args:\\n    top_k: how\\n        many.\\n    a,\\n    b: shares.\\n")
        {'top_k': 'how many.', 'a': 'shares.', 'b': 'shares.'}
    """
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    if section is None:
        return {}
    text = textwrap.dedent(section.group(1))
    heads = list(re.finditer(r"^((?:\w+,\s+)*\w+)(?: \([^)]*\))?:(?=\s)", text, re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {
        name: " ".join(text[head.end() : end].split())
        for head, end in zip(heads, ends, strict=True)
        for name in re.split(r",\s+", head.group(1))
    }

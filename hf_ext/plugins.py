"""What a plugin is, and how the host finds plugins without importing their code.

A package offers plugins through entry points in one of `GROUPS`. The entry point names a
`Plugin`, or a sequence of them, in a module that is cheap to import (a manifest); the class
itself is imported by `Plugin.load()` only. The host knows no plugin by name.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from hf_ext import namespace

#: Entry point groups that are searched, in this order.
GROUPS = (
    "hf_ext.modeling",
    "hf_ext.generation",
    "hf_ext.cache",
    "hf_ext.trainer_callbacks",
    "hf_ext.attention",
    "hf_ext.plugins",
)


_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_PLACE = re.compile(r"\w+(\.\w+)*:\w+")


class PluginError(Exception):
    """A plugin is unknown, broken or collides with another one."""


@dataclass(frozen=True)
class Plugin:
    """One method and where its class lives.

    Args:
        name: unique, lower case, words joined by hyphens (`"contrastive-search"`).
        kind: what it plugs into: `"model"`, `"strategy"`, `"cache"`, `"objective"`, ...
        summary: one sentence on what it does for the user.
        target: where the class is, as `"package.module:Class"`.
        paper: title and identifier of its source (`"Title (arXiv:2202.06417)"`).
        covers: slugs of the literature list that it implements.
        auto: for models, the Auto classes it registers with and the class for each, as
            `"package.module:Class"`; needs at least `"AutoConfig"`.
        example: a few lines of code that a user can paste.
        claims: where its claim checks are, as `"package.module:CLAIMS"`.

    Raises:
        ValueError: `name`, `target`, `auto` or `claims` is not of the form above.

    Example:
        >>> Plugin("counter", "tool", "Counts things.", target="collections:Counter").load()
        <class 'collections.Counter'>
    """

    name: str
    kind: str
    summary: str
    target: str
    paper: str = ""
    covers: tuple[str, ...] = ()
    auto: Mapping[str, str] = field(default_factory=dict)
    example: str = ""
    claims: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"plugin name {self.name!r} must be lower-case words joined by hyphens")
        for what in (self.target, *self.auto.values(), *filter(None, [self.claims])):
            if not _PLACE.fullmatch(what):
                raise ValueError(f"plugin {self.name!r} names {what!r}, expected 'package.module:attribute'")
        if self.auto and "AutoConfig" not in self.auto:
            raise ValueError(f"plugin {self.name!r} has auto classes but no 'AutoConfig' among them")

    def load(self) -> Any:
        """Import and return the plugin's class.

        Raises:
            PluginError: the module cannot be imported or lacks the class.
        """
        return resolve(self.target, self.name)


@dataclass(frozen=True)
class BrokenPlugin:
    """An entry point that could not be read: its name, the package that ships it, and why."""

    name: str
    package: str
    error: str


def resolve(target: str, name: str) -> Any:
    """Import `"module:attribute"` on behalf of a plugin.

    Args:
        target: what is imported.
        name: the plugin's name, for the error.

    Returns:
        The attribute.

    Raises:
        PluginError: naming the plugin, the module and the cause.

    Example:
        >>> resolve("collections:Counter", "counter")
        <class 'collections.Counter'>
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # any failure of foreign code is reported under the plugin's name
        raise PluginError(f"plugin {name!r} cannot load {target!r}: {type(error).__name__}: {error}") from error


def all(kind: str | None = None) -> list[Plugin]:
    """Return every plugin that is installed, sorted by kind and name.

    Broken third-party plugins are left out and named in a warning; `broken()` returns them.

    Args:
        kind: keep only plugins of this kind.

    Returns:
        The records; nothing of a plugin but its record is imported.

    Example:
        >>> [plugin.name for plugin in all(kind="no-such-kind")]
        []
    """
    found, bad = _discover()
    for item in bad:
        warnings.warn(f"plugin {item.name!r} of package {item.package!r} is broken: {item.error}", stacklevel=2)
    return [plugin for plugin in found if kind is None or plugin.kind == kind]


def broken() -> list[BrokenPlugin]:
    """Return the entry points that could not be read, with the reason for each."""
    return list(_discover()[1])


def get(name: str) -> Plugin:
    """Return the plugin called `name`; a slug that exactly one plugin covers also works.

    Args:
        name: as `hf-ext list` prints it, or a slug.

    Returns:
        The record, whose `load()` imports the class.

    Raises:
        PluginError: no such plugin (the message lists the nearest names), a broken one, or a slug
            that several plugins cover.

    Example:
        >>> get("contrastive-search").kind
        'strategy'
    """
    found, bad = _discover()
    matches = [p for p in found if p.name == name] or [p for p in found if name in p.covers]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise PluginError(f"{name!r} is covered by several plugins: {', '.join(p.name for p in matches)}; name one")
    for item in bad:
        if item.name == name:
            raise PluginError(f"plugin {name!r} of package {item.package!r} is broken: {item.error}")
    near = difflib.get_close_matches(name, [p.name for p in found], n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else "`hf-ext list` prints all of them"
    raise PluginError(f"unknown plugin {name!r}; {hint}")


def refresh() -> None:
    """Forget what was found, for a process that installs a plugin while it runs."""
    _discover.cache_clear()


@functools.cache
def _discover() -> tuple[tuple[Plugin, ...], tuple[BrokenPlugin, ...]]:
    found: dict[str, Plugin] = {}
    owner: dict[str, str] = {}
    bad: list[BrokenPlugin] = []
    for entry in _entries():
        try:
            plugins = _read(entry)
        except Exception as error:  # one broken package must not hide the others
            bad.append(BrokenPlugin(entry.name, _package(entry), f"{type(error).__name__}: {error}"))
            continue
        for plugin in plugins:
            if found.setdefault(plugin.name, plugin) == plugin:
                owner.setdefault(plugin.name, _package(entry))
            else:
                taken = f"the name is taken by a plugin of package {owner[plugin.name]!r}"
                bad.append(BrokenPlugin(plugin.name, _package(entry), taken))
    return tuple(sorted(found.values(), key=lambda p: (p.kind, p.name))), tuple(bad)


def _entries() -> list[EntryPoint]:
    """Entry points of all groups; this package's come first, so that nobody takes its plugins' names."""
    found = [entry for group in GROUPS for entry in entry_points(group=group)]
    own = __name__.partition(".")[0]
    return sorted(found, key=lambda entry: (_package(entry) != own, GROUPS.index(entry.group), entry.name))


def _read(entry: EntryPoint) -> list[Plugin]:
    value = entry.load()
    plugins = [value] if isinstance(value, Plugin) else list(value) if isinstance(value, Iterable) else [value]
    for plugin in plugins:
        if not isinstance(plugin, Plugin):
            raise TypeError(f"{entry.value} holds a {type(plugin).__name__}, expected hf_ext.plugins.Plugin")
    return plugins


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


namespace.complete()

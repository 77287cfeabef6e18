"""Package attributes that are imported when first used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hf_ext import namespace


def lazy_attributes(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """Build `__getattr__` and `__all__` for a package whose names live in submodules.

    Args:
        package: the package's `__name__`.
        where: for each public name the submodule that defines it.

    Returns:
        The module-level `__getattr__` and the list of public names.

    Example:
        >>> get, names = lazy_attributes("json", {"JSONDecoder": "decoder"})
        >>> get("JSONDecoder").__name__, names
        ('JSONDecoder', ['JSONDecoder'])
    """

    def __getattr__(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(where))}")
        value = getattr(importlib.import_module(f"{package}.{where[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, sorted(where)


namespace.complete()  # here, because nearly every import of hf_ext passes here

"""Make the package whole where Python took the folder of a checkout for it.

Seen from the folder above it, a checkout that is called `hf_ext` is a namespace package: a folder of the
package's name without `__init__.py`. An editable install does not outrank that. Submodules are found still, but
`hf_ext/__init__.py` is never run, and nothing would be registered with transformers, without a word.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def complete() -> None:
    """Run `__init__.py` of the package if Python has not found it; otherwise do nothing.

    Example:
        >>> import hf_ext
        >>> complete()
        >>> hf_ext.__file__.endswith("__init__.py")
        True
    """
    package = sys.modules[__name__.rpartition(".")[0]]
    if getattr(package, "__file__", None) is not None:
        return
    source = Path(__file__).with_name("__init__.py")
    spec = importlib.util.spec_from_file_location(
        package.__name__, source, submodule_search_locations=[str(source.parent)]
    )
    assert spec is not None
    assert spec.loader is not None
    package.__spec__, package.__file__, package.__path__ = spec, str(source), [str(source.parent)]
    spec.loader.exec_module(package)

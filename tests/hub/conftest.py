from __future__ import annotations

import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from transformers import dynamic_module_utils

from hf_ext import plugins
from hf_ext.plugins import Plugin
from hf_ext.testing.local_hub import LocalHub

_numbers = itertools.count()


STRATEGY = '''
    """Repeat the last token."""
    from __future__ import annotations

    from dataclasses import dataclass
    from typing import TYPE_CHECKING

    import torch

    from {package} import tools
    from {package}.engine import extend
    from {package} import Log as Journal, lengthen
    import {package}.settings as settings

    if TYPE_CHECKING:
        import no_such_package
        from {package}.engine import extend as other

    @dataclass
    class Repeat:
        """Repeat the last token.

        Args:
            times: how often the last token
                is repeated.
            top_k: has the name of a setting of generate.
        """

        times: int = 2
        top_k: int | None = None
        tokenizer: object = None

        def generate(self, model, inputs=None, *, tokenizer=None, **kwargs):
            from .deep.tools import depth
            ids = inputs if inputs is not None else kwargs["input_ids"]
            kept = sorted(name for name, value in kwargs.items() if value is not None)
            Journal.lines.append((self.times, self.top_k, self.tokenizer, tokenizer, kept))
            if model is not None:
                model.journal = Journal.lines
            return extend(ids, tools.double(self.times) * settings.FACTOR * lengthen(1) * depth())
'''

FILES = {
    "__init__.py": """
        from .log import Log
        from hf_ext.lazy import lazy_attributes
        __getattr__, __all__ = lazy_attributes(__name__, {"lengthen": "engine"})
    """,
    "strategy.py": STRATEGY,
    "engine.py": """
        import torch
        def extend(ids, times):
            from {package}.strategy import Repeat  # a circle
            return torch.cat([ids, ids[:, -1:].repeat(1, times)], dim=1)
        def lengthen(x):
            return x
    """,
    "tools.py": "def double(x):\n    return 2 * x\n",
    "log.py": "class Log:\n    lines = []\n",
    "settings.py": "FACTOR = 1\n",
    "deep/__init__.py": "",
    "deep/tools.py": "from ..settings import FACTOR\nfrom .. import tools as upper\ndef depth():\n    return FACTOR\n",
}


@pytest.fixture(autouse=True)
def remote_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test loads remote code into a cache of its own, and its modules are forgotten afterwards."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path.parent / f"{tmp_path.name}-modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A running local Hub; the client in this process is kept from Xet and from the user's token."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in set(os.environ) & {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with LocalHub() as running:
        yield running


@pytest.fixture
def toy_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes somebody else's package with the toy strategy; keywords replace or add files by module name."""

    def write(**changes: str) -> str:
        package = f"toy{next(_numbers)}"
        files = FILES | {f"{module}.py": text for module, text in changes.items()}
        for path, text in files.items():
            target = tmp_path / "site" / package / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(textwrap.dedent(text).replace("{package}", package).lstrip("\n"))
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        return package

    return write


@pytest.fixture
def toy_plugin(toy_package: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plugin]:
    """Installs the plugin `"repeat"` of the toy package."""
    real = plugins.get

    def install(kind: str = "strategy", **changes: str) -> Plugin:
        plugin = Plugin("repeat", kind, "Repeats the last token.", target=f"{toy_package(**changes)}.strategy:Repeat")
        monkeypatch.setattr(plugins, "get", lambda name: plugin if name == "repeat" else real(name))
        return plugin

    return install

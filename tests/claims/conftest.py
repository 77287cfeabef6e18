"""A plugin that exists only for these tests, with claims that do as they are told."""

import pytest

from hf_ext import plugins
from hf_ext.plugins import Plugin

MODULE = '''
from dataclasses import dataclass

from hf_ext.verify import Claim, Measurement, Threshold


@dataclass
class Toy:
    """A toy.

    Args:
        size: how large it is.
    """

    size: int = 3


def breaks():
    raise RuntimeError("the disk is made of cheese")


exact = Claim(
    "exact", "It changes nothing.", "tokens that differ", Threshold("==", 0), lambda: Measurement(0), unit="tokens"
)
better = Claim(
    "better", "It helps | a lot.", "diversity gained", Threshold(">=", 0.25),
    lambda: Measurement(0.125, spread=(0.0625, 0.25), spread_of="95 % interval over 8 prompts", seeds=(0, 1),
                        details={"plain": 0.5, "ours": 0.625}),
    data="Held-out functions",
)
reported = Claim("reported", "No figure is given.", "isotropy", None, lambda: Measurement(0.3125))
broken = Claim("broken", "It works.", "whether it works", Threshold("==", 1), breaks)
CLAIMS = (exact, better, reported)
'''


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The module behind the only installed plugin, `toy`; set `CLAIMS` on it to change its claims."""
    import importlib
    import sys

    (tmp_path / "toy_claims_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_claims_module", raising=False)
    module = importlib.import_module("toy_claims_module")
    plugin = Plugin(
        "toy", "strategy", "Shows how it is done.", target="toy_claims_module:Toy", paper="Toys (arXiv:0000.00000)",
        claims="toy_claims_module:CLAIMS", example="print('hello')",
    )  # fmt: skip
    monkeypatch.setattr(plugins, "_discover", lambda: ((plugin,), ()))
    yield module
    sys.modules.pop("toy_claims_module", None)

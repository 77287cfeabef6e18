"""What docs/attention.md shows runs, in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from hf_ext import adapter
from hf_ext.attention import masks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "attention.md"


def test_the_code_of_the_page_runs_in_order(monkeypatch: Any) -> None:
    monkeypatch.setattr(masks, "_CONVERSIONS", dict(masks._CONVERSIONS))
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)  # the page's own code
        assert names["out"].logits.shape[:2] == (1, 7)
        sums = names["statistics"][0].column_sums
        assert torch.allclose(sums.sum(), torch.tensor(7.0 * names["model"].config.num_attention_heads))
    finally:
        for mapping in adapter.attention_mappings():
            mapping.pop("plain_attention", None)

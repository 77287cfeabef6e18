"""What docs/trained-eviction.md shows runs, in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trained-eviction.md"


def test_the_code_of_the_page_runs_in_order() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    exec(compile(blocks[0], str(PAGE), "exec"), names)  # the page's own code
    assert names["trainer"].state.global_step == 2
    exec(compile(blocks[1], str(PAGE), "exec"), names)
    assert names["cache"].get_seq_length() == names["out"].shape[1] - 1
    exec(compile(blocks[2], str(PAGE), "exec"), names)
    assert names["out"].shape[1] <= names["prompt"].shape[1] + 4
    assert names["cache"].held()[0] == names["context"].shape[1] // 4

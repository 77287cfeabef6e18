"""What docs/cache-policies.md shows runs, and names every policy there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_ext import plugins

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "cache-policies.md").read_text(encoding="utf-8")


def test_code_of_the_document_runs_in_order() -> None:
    names: dict[str, Any] = {"__name__": "document"}
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "cache-policies.md", "exec"), names)
        assert 0 < max(names["cache"].held()) < names["cache"].get_seq_length()


def test_every_policy_that_scores_is_in_the_table() -> None:
    targets = [plugin.target for plugin in plugins.all(kind="cache")]
    ours = {target.split(":")[1] for target in targets if target.startswith("hf_ext.cache.policies.")}
    table = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert table <= ours
    assert {name for name in ours if f"`{name}" not in TEXT} <= {"KVMerger", "KIVI", "DynamicContextPruning"}

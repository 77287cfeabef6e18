"""`import hf_ext` is cheap beside `import transformers`, and the record says where that was measured."""

from __future__ import annotations

import json
from pathlib import Path

from hf_ext.benchmarks import import_time

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MS = 50


def test_import_costs_less_than_fifty_milliseconds_beyond_transformers() -> None:
    found = import_time.measure(runs=3, before=["after `import transformers`"])
    [figures] = found.values()
    assert figures["before_median_ms"] > figures["median_ms"] > 0
    # Processor time: the wall clock also runs while other tests have the cores.
    assert 0 < figures["cpu_median_ms"] < LIMIT_MS, found


def test_the_committed_record_holds_hardware_versions_and_the_limit() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "import_time.json").read_text(encoding="utf-8"))
    assert record["runs"] >= 5
    assert record["hardware"]["cpu"]
    assert {"torch", "transformers", "hf_ext", "python"} <= record["versions"].keys()
    assert record["import_hf_ext"].keys() == import_time.BEFORE.keys()
    assert record["import_hf_ext"]["after `import transformers`"]["median_ms"] < LIMIT_MS

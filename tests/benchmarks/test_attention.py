"""The benchmark of attention runs, compares what is the same, and its record keeps what is promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_ext.benchmarks import attention
from hf_ext.cli.output import CliError

ROOT = Path(__file__).resolve().parents[2]


def test_a_quick_run_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attention.main(["--quick", "--threads", "1", "--json", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert len(record["rows"]) == 5
    for row in record["rows"]:
        low, high = row["interval"]
        assert 0 < low <= row["ratio"] <= high
        assert row["what"] in attention.markdown(record)
    assert "hf_ext ms" in capsys.readouterr().out


def test_the_median_ratio_is_that_of_the_work() -> None:
    small, large = torch.zeros(200, 200), torch.zeros(800, 800)
    found = attention.compare(lambda: lambda: small @ small, lambda: lambda: large @ large, rounds=9)
    assert found["ratio"] > 2
    assert found["interval"][0] <= found["ratio"] <= found["interval"][1]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(CliError, match="rounds"):
        attention.main(["--rounds", "1"])


def test_the_committed_record_keeps_its_promises() -> None:
    """At most 3 % over SDPA for plain use; a structured prompt costs no more than its dense mask."""
    record = json.loads((ROOT / "benchmarks" / "results" / "attention.json").read_text(encoding="utf-8"))
    assert record["hardware"]["cpu"]
    assert {"torch", "transformers", "hf_ext", "python"} <= record["versions"].keys()
    kinds = [row["baseline"] for row in record["rows"]]
    assert kinds.count("sdpa") >= 6
    assert kinds.count("sdpa, dense mask") >= 2
    for row in record["rows"]:
        if row["baseline"] == "sdpa":
            assert min(row["ratio"], row["cpu_ratio"]) < 1.03, row
            assert row["interval"][0] < 1.03, row
        if row["baseline"] == "sdpa, dense mask":
            assert min(row["interval"][0], row["cpu_ratio"]) < 1.01, row

"""The benchmark of decoding over packed codes runs, and its record says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_ext.benchmarks import quantised_decode
from hf_ext.cli.output import CliError


def test_a_quick_run_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    quantised_decode.main(["--quick", "--bits", "4", "--threads", "1", "--json", str(path)])
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["cache"]: row for row in record["rows"]}
    backends = [name for name in quantised_decode.PACKAGES if quantised_decode.installed(name)]
    assert set(rows) == {"full", "hf_ext", *(f"QuantizedCache, {name}" for name in backends)}
    assert set(record["missing"]) == set(quantised_decode.PACKAGES) - set(backends)
    assert rows["hf_ext"]["ratio"] == 1
    assert rows["hf_ext"]["bytes"] < rows["full"]["bytes"]
    for row in rows.values():
        assert 0 < row["interval"][0] <= row["ratio"] <= row["interval"][1]
        assert row["cache"] in quantised_decode.markdown(record)
    assert "hf_ext" in capsys.readouterr().out


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(CliError, match="rounds"):
        quantised_decode.main(["--rounds", "1"])

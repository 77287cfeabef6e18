"""The benchmark of the loss runs, and times nothing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_ext.benchmarks import linear_loss
from hf_ext.cli.output import CliError


def test_a_quick_run_writes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "memory", lambda loss, name, shape: 8.0 if name == linear_loss.PLAIN else 2.0)
    path = tmp_path / "record.json"
    linear_loss.main(["--quick", "--threads", "1", "--json", str(path)])
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["loss"], row["way"]) for row in record["rows"]] == [
        (loss, way) for loss in linear_loss.LOSSES for way in linear_loss.ways(loss)
    ]
    for row in record["rows"]:
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
        assert row["memory_ratio"] == (1 if row["way"] == linear_loss.PLAIN else 0.25)
        assert row["way"] in linear_loss.markdown(record)


def test_memory_is_that_of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four matrices of logits and gradients at least, against two of a chunk of 64 tokens."""
    found = {name: linear_loss.memory("nll", name, (512, 132_000, 4)) for name in (linear_loss.PLAIN, linear_loss.LOSS)}
    logits = 512 * 132_000 * 4 / 2**20
    assert found[linear_loss.PLAIN] >= 2 * logits, found
    assert found[linear_loss.LOSS] <= logits / 2, found


def test_nothing_is_timed_when_a_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear_loss.ways("nll")
    wrong = {
        **right,
        linear_loss.LOSS: lambda hidden, weight, targets: right[linear_loss.LOSS](hidden * 1.01, weight, targets),
    }
    monkeypatch.setattr(linear_loss, "ways", lambda loss: wrong)
    with pytest.raises(CliError, match="nothing is timed"):
        linear_loss.agree("nll", (8, 50, 4))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(CliError, match="rounds"):
        linear_loss.main(["--rounds", "1"])
    assert torch.get_num_threads() >= 1

"""The benchmark goes through all it would measure, and measures nothing that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_ext.benchmarks import attention_gpu
from hf_ext.cli.output import CliError


def test_a_dry_run_goes_through_everything(capsys: pytest.CaptureFixture[str]) -> None:
    attention_gpu.main(["--dry-run"])
    assert "figures would be measured; on the CPU they would say nothing" in capsys.readouterr().out


def test_what_there_was_no_time_for_is_named() -> None:
    clock = attention_gpu.Clock(torch.device("cpu"), 1)
    found = attention_gpu.measure(torch.device("cpu"), torch.float32, clock, tiny=True, seconds=-1)
    assert found["rows"] == []
    assert [name.partition(",")[0] for name in found["left_out"]] == [
        "causal", "padding", "segments", "column sums", "decoding"
    ]  # fmt: skip


def test_another_way_that_fails_is_recorded_and_ours_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no room\nfor it")

    right = attention_gpu.rivals
    monkeypatch.setattr(attention_gpu, "rivals", lambda *given: {**right(*given), "flash": failing})
    device, shape = torch.device("cpu"), attention_gpu.TINY[0]
    structure = attention_gpu.structures(shape.tokens, device)["causal"]
    rows = attention_gpu.attend(shape, "causal", structure, device, torch.float32, lambda function: 2.0, 1.0)
    assert [row["failed"] for row in rows if row["way"] == "flash"] == ["OutOfMemoryError: no room"]
    assert [row["direction"] for row in rows if row["way"] == "hf_ext"] == ["forward", "backward"]


def test_aims_compare_what_was_measured_on_the_same_problem() -> None:
    rows = [
        {"what": "causal", "tokens": 8, "direction": "forward", "way": "hf_ext", "ms": 2.0},
        {"what": "causal", "tokens": 8, "direction": "forward", "way": "flash", "ms": 1.9},
        {"what": "causal", "tokens": 8, "direction": "forward", "way": "flex", "ms": 1.0},
        {"what": "causal", "tokens": 9, "direction": "forward", "way": "flash", "ms": 9.0},
        {"what": "window", "tokens": 8, "direction": "forward", "way": "hf_ext", "ms": 2.0},
        {"what": "window", "tokens": 8, "direction": "forward", "way": "flex", "ms": 1.9},
        {"what": "column sums", "tokens": 8, "way": "hf_ext", "ms": 1.0},
        {"what": "column sums", "tokens": 8, "way": "eager", "failed": "OutOfMemoryError"},
    ]
    found = [(aim["what"], aim["times_as_fast"], aim["reached"]) for aim in attention_gpu.aims(rows)]
    assert found == [("causal", 0.95, True), ("window", 0.95, False)]


@pytest.mark.parametrize("name", ["attention", "column_sums"])
def test_nothing_is_timed_when_a_result_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(attention_gpu, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        return (found[0] * 1.1, found[1]) if isinstance(found, tuple) else found * 1.1

    def clock(function: Any) -> Any:
        raise AssertionError("timed")

    monkeypatch.setattr(attention_gpu, name, wrong)
    device, shape = torch.device("cpu"), attention_gpu.TINY[0]
    structure = attention_gpu.structures(shape.tokens, device)["causal"]
    measures: dict[str, Callable[[], Any]] = {
        "attention": lambda: attention_gpu.attend(shape, "causal", structure, device, torch.float32, clock, 1.0),
        "column_sums": lambda: attention_gpu.sum_columns(shape, device, torch.float32, clock),
    }
    with pytest.raises(CliError, match="nothing is timed"):
        measures[name]()

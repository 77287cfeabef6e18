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

"""The benchmark of caches goes through all it would measure, and measures nothing that is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ext.benchmarks import cache_gpu
from hf_ext.cli.output import CliError

#: Which function each operation is held by.
HELD = {
    "compact": "compact",
    "compact, ragged": "compact_ragged",
    "ragged attention": "ragged_attention",
    "2-bit attention": "packed_attention",
    "4-bit attention": "packed_attention",
    "merge entries": "merge_entries",
}


def test_a_dry_run_goes_through_everything(capsys: pytest.CaptureFixture[str]) -> None:
    cache_gpu.main(["--dry-run"])
    assert "figures would be measured; on the CPU they would say nothing" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(cache_gpu.MEASURED))
def test_nothing_is_timed_when_a_result_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(cache_gpu, HELD[name])

    def wrong(*args: Any, **kwargs: Any) -> Any:
        first, *others = right(*args, **kwargs)
        return (first * 1.1, *others)

    def clock(function: Any) -> Any:
        raise AssertionError("timed")

    monkeypatch.setattr(cache_gpu, HELD[name], wrong)
    small = cache_gpu.Shape(1, 2, 1, 32, 32)
    with pytest.raises(CliError, match="nothing is timed"):
        cache_gpu.compare(name, small, torch.device("cpu"), torch.float32, clock, 1.0)

"""Caches run through the Triton kernels, under the interpreter and so without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux only")


def test_caches_through_the_kernels_are_what_a_full_cache_says() -> None:
    script = Path(__file__).with_name("kernel_path.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    record = json.loads(done.stdout.splitlines()[-1])
    wrong = {name: difference for name, difference in record["found"].items() if not difference < 5e-5}
    assert not wrong, f"largest differences: {wrong}"
    assert len(record["found"]) == 7
    kernels = {"attend_with_kernels", "compact", "ragged_attention", "packed_attention", "merge_entries"}
    assert set(record["calls"]) == kernels, record["calls"]

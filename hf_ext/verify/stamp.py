"""Where and with what a figure was measured."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: Packages whose versions stand beside every figure.
PACKAGES = ("torch", "transformers", "hf_ext")


def hardware() -> dict[str, object]:
    """Describe the processor, the cores this process may use, torch's threads and the GPU if there is one.

    Example:
        >>> sorted(hardware())[:3]
        ['accelerator', 'cores', 'cpu']
    """
    import torch

    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        "cpu": _cpu_model(),
        "machine": platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages in `PACKAGES`.

    Example:
        >>> sorted(versions())
        ['hf_ext', 'python', 'torch', 'transformers']
    """
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def weights() -> dict[str, str]:
    """Return the first digits of the SHA-256 of each embedded model's weights, `"absent"` for one that is not there.

    Figures measured with other weights than those installed are out of date.

    Example:
        >>> sorted(weights())
        ['draft', 'target']
    """
    from hf_ext import demo

    found = {}
    for name in ("target", "draft"):
        path = Path(demo.path(name)) / "model.safetensors"
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "absent"
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # used from a source tree that was never installed
        return "not installed"


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"

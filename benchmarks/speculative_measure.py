"""Counting, timing and weighing decoding calls, the same way whoever decodes."""

from __future__ import annotations

import ctypes
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

#: Widths at which the cost of a call is measured.
WIDTHS = (1, 2, 4, 6, 9, 16, 32, 64)


def _matrices(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a layer that hold a matrix and nothing else."""
    return [m for m in layer.modules() if not list(m.children()) and any(p.ndim > 1 for p in m.parameters())]


class Passes:
    """Counts forward passes of a model by hooks on its layers, for the duration of a `with` block.

    A method that drafts with the first layers of the target, or skips some, never calls the model as a
    whole. So a *call* is counted where the least visited layer ran: only passes that end in the target's
    own logits visit all layers. What other layers ran beyond that is drafting with the target.

    Args:
        model: the model; its longest `ModuleList` holds the layers.

    Attributes:
        first_seconds: of the first pass through all layers, which reads the prompt.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.build("llama")
        >>> with Passes(model) as passes:
        ...     _ = model(torch.tensor([[3, 4, 5]])), model(torch.tensor([[6]]))
        >>> passes.calls, passes.positions, passes.partial_calls, passes.partial_work
        (2, 4, 0, 0.0)
    """

    def __init__(self, model: PreTrainedModel) -> None:
        lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
        # The first and the last matrix of each layer: a layer or a part of one that is left out is still called.
        layers: list[nn.Module] = max(lists, key=len)
        self._layers = [leaves[at] for leaves in map(_matrices, layers) for at in (0, -1)]
        self._visits = [0] * len(self._layers)
        self._positions = [0] * len(self._layers)
        self._began: float | None = None
        self.first_seconds = 0.0

    def __enter__(self) -> Passes:
        self._hooks = [
            layer.register_forward_pre_hook(self._note(i), with_kwargs=True) for i, layer in enumerate(self._layers)
        ]
        self._hooks.append(self._layers[-1].register_forward_hook(self._end))
        return self

    def _note(self, index: int) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shape = (args[0] if args else kwargs["input"]).shape
            self._visits[index] += 1
            self._positions[index] += shape[0] * shape[1]
            if self._began is None:
                self._began = time.perf_counter()

        return note

    def _end(self, *_: Any) -> None:
        if self._visits[-1] == 1 and self._began is not None:
            self.first_seconds = time.perf_counter() - self._began

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def calls(self) -> int:
        """Passes through all layers."""
        return min(self._visits)

    @property
    def positions(self) -> int:
        """Positions that those passes evaluated, over all rows."""
        return min(self._positions)

    @property
    def partial_calls(self) -> int:
        """Passes through some of the layers."""
        return max(self._visits) - min(self._visits)

    @property
    def partial_work(self) -> float:
        """Layers that partial passes ran, in passes through all layers."""
        return sum(self._visits) / len(self._visits) - min(self._visits)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and its seconds."""
    start = time.perf_counter()
    out = call()
    return out, time.perf_counter() - start


@torch.no_grad()
def widths(
    model: PreTrainedModel, ks: Sequence[int] = WIDTHS, context: int = 128, repeats: int = 7, seed: int = 0
) -> dict[int, float]:
    """Return the median milliseconds of a forward pass over k new tokens after `context` cached ones.

    Args:
        model: the model.
        ks: numbers of new tokens, measured in turns.
        context: tokens in the cache.
        repeats: measurements of each.
        seed: of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, model.config.vocab_size, (1, context + max(ks)), generator=generator)
    cache = DynamicCache(config=model.config)
    model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
    seconds: dict[int, list[float]] = {k: [] for k in ks}
    for turn in range(repeats + 1):
        for k in ks:
            _, spent = timed(functools.partial(model, ids[:, context : context + k], past_key_values=cache))
            cache.crop(-k)
            if turn:  # the first is a warm-up
                seconds[k].append(spent)
    return {k: 1e3 * statistics.median(values) for k, values in seconds.items()}


def at_width(curve: dict[int, float], k: float) -> float:
    """Return the milliseconds of a call over `k` positions, on the line between the widths measured beside it.

    Example:
        >>> at_width({1: 10.0, 2: 12.0, 4: 20.0}, 3), at_width({1: 10.0, 2: 12.0}, 4)
        (16.0, 16.0)
    """
    ks = sorted(curve)
    above = next((i for i, width in enumerate(ks) if width >= k), len(ks) - 1)
    high = max(1, above)
    low_k, high_k = ks[high - 1], ks[high]
    return curve[low_k] + (curve[high_k] - curve[low_k]) * (max(k, ks[0]) - low_k) / (high_k - low_k)


def peak_memory(call: Callable[[], Any]) -> float | None:
    """Return by how many MiB the resident memory grew at most during a call.

    The kernel's own high-water mark is set back before the call, after unreachable objects are collected
    and freed pages given back. It sees what torch, MKL and Python hold alike, at the moment they hold it.

    Returns:
        MiB, or None where the kernel keeps no such mark that can be set back (it is Linux that does).
    """
    if sys.platform != "linux":
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """Return a figure of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def weights_memory(*models: PreTrainedModel) -> float:
    """Return the MiB of the models' weights."""
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters()) / 2**20

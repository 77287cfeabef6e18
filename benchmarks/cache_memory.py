"""What caches hold: resident bytes beside the budget, and the peak of memory over the length of a prompt.

    python -m hf_ext.benchmarks.cache_memory '{"method": "knorm", "length": 4000, "chunk": 512, "budget": 512}'

prints the peak of one prompt, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from hf_ext.benchmarks.cache_methods import FULL, Method, bytes_of, methods, reason
from hf_ext.benchmarks.cache_speed import model_of
from hf_ext.benchmarks.speculative_measure import peak_memory
from hf_ext.cache import CompressedCache

#: Whose peaks are drawn: one that looks at nothing, one at keys, one at the last queries, one at all, one that codes.
CURVES = (FULL, "streaming-llm", "knorm", "snapkv", "h2o", "kvmerger", "kivi 2 bits")


def find(name: str) -> Method:
    """Return the method of a name, with its defaults."""
    return next(method for method in methods(short=False) if method.name == name)


@torch.no_grad()
def prefill(model: Any, cache: Any, ids: torch.Tensor, chunk: int) -> None:
    """Read a prompt in chunks."""
    for part in ids.split(chunk or ids.shape[1], dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)


def point(
    method: str, length: int, chunk: int, budget: int | float, layers: int = 8, hidden: int = 256
) -> dict[str, Any]:
    """Measure the peak of one prompt.

    Args:
        method: its name.
        length: tokens.
        chunk: tokens that are read at a time; 0 for all.
        budget: of the cache.
        layers: of the model.
        hidden: its width.

    Returns:
        `rss_mib`, by which the resident memory grew at most, None where the system does not tell; `device_mib`, the
        same of a GPU, None without one; `held_mib`, what the cache holds in the end.
    """
    torch.set_num_threads(1)
    chosen = find(method)
    cuda = torch.cuda.is_available()
    model = model_of(layers, hidden).to("cuda" if cuda else "cpu")
    model.set_attn_implementation(chosen.implementation)
    ids = torch.randint(2, 2048, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    prefill(model, chosen.cache(model, 32, 64), ids[:, :64], 32)  # what is allocated once
    before = 0
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    cache = chosen.cache(model, budget, length)
    rss = peak_memory(lambda: prefill(model, cache, ids, chunk))
    device = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None
    return {"rss_mib": rss, "device_mib": device, "held_mib": bytes_of(cache) / 2**20}


def curves(
    lengths: Sequence[int], chunk: int, budget: int, workers: int, shape: tuple[int, int] = (8, 256),
    only: Sequence[str] = (), tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure peaks over lengths, each in a process of its own.

    Args:
        lengths: of prompts, in tokens.
        chunk: tokens that are read at a time.
        budget: tokens that caches with a budget keep.
        workers: processes at a time.
        shape: layers and width of the model.
        only: names of methods, beside the full cache; those of `CURVES` by default.
        tell: called with a line from time to time.
    """
    names = {method.name for method in methods(short=False) if not method.problem}
    jobs = [(FULL, length, 0) for length in lengths]
    chosen = [name for name in ((FULL, *only) if only else CURVES) if name in names]
    jobs += [(name, length, chunk) for name in chosen for length in lengths]

    def one(job: tuple[str, int, int]) -> dict[str, Any]:
        method, length, size = job
        given = {
            "method": method,
            "length": length,
            "chunk": size,
            "budget": budget,
            "layers": shape[0],
            "hidden": shape[1],
        }
        command = [sys.executable, "-m", __name__, json.dumps(given)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {run.stderr.strip().splitlines()[-1:]}")
        tell(f"memory: {method}, {length} tokens")
        return {"method": method, "length": length, "chunk": size, **json.loads(run.stdout.splitlines()[-1])}

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        return list(pool.map(one, jobs))


@torch.no_grad()
def resident(
    length: int, decoded: int, budgets: Sequence[int | float], shape: tuple[int, int] = (2, 128)
) -> list[dict[str, Any]]:
    """Compare what caches hold with what their budget says, with heads of width 64.

    Args:
        length: tokens of the prompt.
        decoded: tokens after it.
        budgets: of caches that take one.
        shape: layers and width of the model.

    Returns:
        A row for each method and budget: `after_prefill` and `after_decoding`, bytes held over those of the keys and
        values that the budget allows; for caches without a budget over those of a full cache.
    """
    model = model_of(*shape)
    ids = torch.randint(2, 2048, (1, length + decoded), generator=torch.Generator().manual_seed(0))
    rows = []
    for method in methods(short=False):
        for budget in budgets if method.budgeted else (1.0,):
            row: dict[str, Any] = {"method": method.name, "kind": method.kind, "budget": budget}
            if method.problem:
                rows.append({**row, "problem": method.problem})
                continue
            model.set_attn_implementation(method.implementation)
            try:
                cache = method.cache(model, budget, length)
                model(ids[:, :length], past_key_values=cache, logits_to_keep=1)
                row["after_prefill"] = bytes_of(cache) / _nominal(model, cache, budget, length)
                for column in range(length, length + decoded):
                    model(ids[:, column : column + 1], past_key_values=cache)
                row["after_decoding"] = bytes_of(cache) / _nominal(model, cache, budget, length + decoded)
            except Exception as error:
                row["problem"] = reason(error)
            rows.append(row)
    return rows


def _nominal(model: Any, cache: Any, budget: int | float, tokens: int) -> float:
    if isinstance(cache, CompressedCache):
        return cache.nominal_bytes()
    config = model.config
    kept = budget if isinstance(budget, int) else budget * tokens
    return min(kept, tokens) * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4


if __name__ == "__main__":
    print(json.dumps(point(**json.loads(sys.argv[1]))))

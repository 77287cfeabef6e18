"""Attention kernels on a GPU: speed beside PyTorch's flash attention, flex attention and eager, once they are right.

    hf-ext bench attention_gpu                 on a GPU, into benchmarks/results/attention_gpu_DEVICE.json
    TRITON_INTERPRET=1 hf-ext bench attention_gpu --dry-run    on the CPU: tiny shapes, every path, no figures

Each shape is first held against float64 at its first and last queries; a shape that is wrong ends the run with an
error, and nothing is timed. Speeds are TFLOP/s of the pairs that see each other, also as a share of what a large
matrix product reaches on the same device just before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hf_ext.attention import AttentionStructure
from hf_ext.attention.blocks import kernel_arguments
from hf_ext.cli.output import CliError, print_table
from hf_ext.kernels.attention import attention, attention_reference
from hf_ext.kernels.column_sums import column_sums, column_sums_reference
from hf_ext.kernels.decode_attention import decode_attention
from hf_ext.verify.stamp import hardware, versions

#: The largest error of a result, relative to the largest value; both are rounded to bfloat16 within.
BOUND = 2e-2


@dataclass(frozen=True)
class Shape:
    """A problem: rows, heads, key heads, tokens and the width of a head."""

    batch: int
    heads: int
    key_heads: int
    tokens: int
    width: int

    def tensors(self, device: torch.device, dtype: torch.dtype, queries: int | None = None) -> list[torch.Tensor]:
        """Return query, key and value as models have them, tokens first in memory."""
        generator = torch.Generator(device).manual_seed(0)
        sizes = ((self.heads, queries or self.tokens), (self.key_heads, self.tokens), (self.key_heads, self.tokens))
        return [
            torch.randn(self.batch, tokens, heads, self.width, device=device, generator=generator)
            .to(dtype)
            .transpose(1, 2)
            for heads, tokens in sizes
        ]


SHAPES = [
    Shape(4, 32, 8, 4096, 128), Shape(1, 32, 8, 16384, 128), Shape(16, 32, 8, 1024, 128), Shape(4, 32, 32, 4096, 64),
    Shape(2, 16, 8, 4096, 256), Shape(4, 32, 32, 4096, 80),
]  # fmt: skip
STRUCTURED = [Shape(2, 32, 8, 8192, 128)]
DECODED = [Shape(1, 32, 8, 16384, 128), Shape(8, 32, 8, 8192, 128), Shape(32, 32, 8, 2048, 128)]
SUMMED = [Shape(1, 32, 8, tokens, 128) for tokens in (2048, 4096, 8192)]
TINY = [Shape(1, 2, 1, 24, 16)]


def structures(tokens: int, device: torch.device) -> dict[str, AttentionStructure]:
    """Return structures over a row of tokens, by name."""
    plain = AttentionStructure.causal(torch.ones(1, tokens, device=device))
    column = torch.arange(tokens, device=device)[None]
    padded = AttentionStructure.causal(column >= tokens // 4)
    quarter, eighth = tokens // 4, tokens // 8
    inside = (column >= eighth) & (column < tokens - eighth)
    segments = torch.where(inside, (column - eighth) // eighth + 1, 0)
    return {
        "causal": plain,
        "window": plain.windowed(max(tokens // 8, 1)),
        "padding": padded,
        "documents": plain.documents(column // quarter + 1),
        "prefix": plain.spans((column < quarter).int()),
        "segments": plain.segments(segments),
    }


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1))


def demand(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise unless a result is right.

    Raises:
        CliError: it is not.
    """
    off = error(found, expected)
    if not off <= BOUND:
        raise CliError(f"{what} is off by {off:.2e} of its largest value, at most {BOUND} is right: nothing is timed")


def check(shape: Shape, tensors: list[torch.Tensor], structure: AttentionStructure, out: torch.Tensor) -> None:
    """Hold the first and the last queries of a group of heads against float64."""
    group, some = shape.heads // shape.key_heads, min(128, shape.tokens)
    query, key, value = (t[:1, :n].double() for t, n in zip(tensors, (group, 1, 1), strict=True))
    for place in (slice(0, some), slice(shape.tokens - some, shape.tokens)):
        fields = structure.queries.map(lambda field, place=place: field[:, place])
        part = AttentionStructure(fields, structure.keys, structure.window)
        expected, _ = attention_reference(query[:, :, place], key, value, structure=part)
        demand(f"attention of {shape} at {place}", out[:1, :group, place], expected)


class Clock:
    """Times functions: by the device's events, with its cache emptied before each run."""

    def __init__(self, device: torch.device, runs: int) -> None:
        self.device = device
        self.runs = runs

    def __call__(self, function: Callable[[], Any]) -> float:
        """Return the median of seconds."""
        if self.device.type == "cuda":
            import triton.testing

            return float(triton.testing.do_bench(function, warmup=50, rep=10 * self.runs, return_mode="median")) / 1e3
        times = []
        for _ in range(self.runs):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)


def peak(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Return the TFLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 64
    left = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / clock(lambda: left @ left) / 1e12


def gradients(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> Callable[[], Any]:
    """Return a function that computes the gradients of an attention whose forward pass was done."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    generator = torch.Generator(out.device).manual_seed(1)  # the same for all ways: their gradients are compared
    grad = torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def rivals(structure: AttentionStructure, shape: Shape, plain: bool, device: torch.device) -> dict[str, Any]:
    """Return ways to attend, by name; all take query, key and value."""
    arguments = kernel_arguments(structure)
    found: dict[str, Any] = {
        "hf_ext": (lambda q, k, v: attention(q, k, v, causal=True)[0])
        if plain
        else (lambda q, k, v: attention(q, k, v, structure=arguments)[0]),
    }
    if device.type == "cuda":
        flex, seen = torch.compile(flex_attention), structure.mask_function()
        blocks = create_block_mask(seen, None, None, shape.tokens, shape.tokens, device=device, _compile=True)
        found["flex"] = lambda q, k, v: flex(q, k, v, block_mask=blocks, enable_gqa=True)
    else:  # flex attention has no gradients on the CPU
        found["flex"] = lambda q, k, v: attention_reference(q, k, v, structure=structure)[0]

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if device.type == "cuda" else [SDPBackend.MATH]):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return found | ({"flash": flash} if plain else {})


def attend(
    shape: Shape, name: str, structure: AttentionStructure, device: torch.device, dtype: torch.dtype, clock: Clock,
    best: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the speeds of all ways on one shape, forward and backward."""
    tensors = shape.tensors(device, dtype)
    ways = rivals(structure, shape, name == "causal", device)
    check(shape, tensors, structure, ways["hf_ext"](*tensors))
    expected = gradients(ways["flex"], tensors)()
    for what, a, b in zip(("query", "key", "value"), gradients(ways["hf_ext"], tensors)(), expected, strict=True):
        demand(f"gradient of the {what} of {shape}, beside flex attention's,", a, b.double())
    del expected
    pairs = float(structure.dense().float().mean()) if shape.tokens <= 8192 else 0.5
    flops = 4 * shape.batch * shape.heads * shape.tokens**2 * shape.width * pairs / 1e12
    rows = []
    for way, function in ways.items():
        with torch.no_grad():
            forward = clock(partial(function, *tensors))
        backward = clock(gradients(function, tensors))
        for direction, seconds, work in (("forward", forward, flops), ("backward", backward, 2.5 * flops)):
            speed = work / seconds
            rows.append(
                {"what": name, **asdict(shape), "direction": direction, "way": way, "ms": seconds * 1e3,
                 "tflops": speed, "share_of_peak": speed / best}
            )  # fmt: skip
    return rows


def decode(shape: Shape, device: torch.device, dtype: torch.dtype, clock: Clock) -> list[dict[str, Any]]:
    """Return the speeds of one query over a cache."""
    tensors = shape.tensors(device, dtype, queries=1)
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "hf_ext": lambda q, k, v: decode_attention(q, k, v, causal=True)[0],
        "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }
    expected, _ = attention_reference(*[tensor[:1].double() for tensor in tensors], causal=True)
    demand(f"decoding of {shape}", ways["hf_ext"](*tensors)[:1], expected)
    size = 2 * shape.batch * shape.key_heads * shape.tokens * shape.width * dtype.itemsize
    rows = []
    for way, function in ways.items():
        with torch.no_grad():
            seconds = clock(partial(function, *tensors))
        gigabytes = size / seconds / 1e9
        rows.append({"what": "decode", **asdict(shape), "way": way, "ms": seconds * 1e3, "gb_per_s": gigabytes})
    return rows


def sum_columns(shape: Shape, device: torch.device, dtype: torch.dtype, clock: Clock) -> list[dict[str, Any]]:
    """Return the speed and the memory of attention with column sums, beside eager's matrix."""
    query, key, value = shape.tensors(device, dtype)

    def ours() -> torch.Tensor:
        _, lse = attention(query, key, value, causal=True)
        return column_sums(query, key, lse, causal=True)

    def eager() -> torch.Tensor:
        keys = key.repeat_interleave(shape.heads // shape.key_heads, 1)
        scores = query @ keys.transpose(-1, -2) * shape.width**-0.5
        hidden = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool, device=device).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(dtype)
        weights @ value.repeat_interleave(shape.heads // shape.key_heads, 1)
        return weights.sum(2, dtype=torch.float32).unflatten(1, (shape.key_heads, -1)).sum(2)

    group = shape.heads // shape.key_heads
    first = [query[:1, :group].double(), key[:1, :1].double(), value[:1, :1].double()]
    _, lse = attention_reference(*first, causal=True)
    demand(f"column sums of {shape}", ours()[:1, :1], column_sums_reference(first[0], first[1], lse, causal=True))
    del first, lse
    rows = []
    for way, function in (("hf_ext", ours), ("eager", eager)):
        taken = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            function()
            torch.cuda.synchronize(device)
            taken = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        with torch.no_grad():
            seconds = clock(function)
        rows.append({"what": "column sums", **asdict(shape), "way": way, "ms": seconds * 1e3, "mib": taken})
    return rows


def measure(device: torch.device, dtype: torch.dtype, clock: Clock, tiny: bool = False) -> dict[str, Any]:
    """Return all figures, or raise a CliError at the first wrong result."""
    best = peak(device, dtype, clock)
    rows: list[dict[str, Any]] = []
    for shape in TINY if tiny else SHAPES:
        causal = structures(shape.tokens, device)["causal"]
        rows += attend(shape, "causal", causal, device, dtype, clock, best)
    for shape in TINY if tiny else STRUCTURED:
        for name, structure in structures(shape.tokens, device).items():
            if name != "causal" and (not tiny or name in ("padding", "segments")):
                rows += attend(shape, name, structure, device, dtype, clock, best)
    for shape in TINY if tiny else DECODED:
        rows += decode(shape, device, dtype, clock)
    for shape in TINY if tiny else SUMMED:
        rows += sum_columns(shape, device, dtype, clock)
    return {"peak_tflops": best, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the record, which has the device's name in its own."""
    parser = argparse.ArgumentParser(prog="hf-ext bench attention_gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50, help="about how many runs a figure is the median of")
    parser.add_argument("--dry-run", action="store_true", help="go through everything on the CPU, without figures")
    parser.add_argument("--out", type=Path, help="folder of the record; by default this checkout's results")
    chosen = parser.parse_args(argv)
    if chosen.dry_run:
        found = measure(torch.device("cpu"), torch.float32, Clock(torch.device("cpu"), 1), tiny=True)
        print(f"{len(found['rows'])} figures would be measured; on the CPU they would say nothing")
        return
    if not torch.cuda.is_available():
        raise CliError("this benchmark needs a GPU; --dry-run goes through it on the CPU")
    device = torch.device("cuda", torch.cuda.current_device())
    found = measure(device, torch.bfloat16, Clock(device, chosen.runs))
    name = torch.cuda.get_device_name(device)
    print(f"{name}: a large matrix product reaches {found['peak_tflops']:.0f} TFLOP/s")
    columns = [
        "what",
        "batch",
        "tokens",
        "width",
        "direction",
        "way",
        "ms",
        "tflops",
        "share_of_peak",
        "gb_per_s",
        "mib",
    ]
    cells = [[row.get(column, "") for column in columns] for row in found["rows"]]
    print_table(columns, [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in line] for line in cells])
    record = {
        "date": datetime.now(UTC).date().isoformat(), "command": "hf-ext bench attention_gpu", "device": name,
        "hardware": hardware(), "versions": versions(), "dtype": "bfloat16", **found,
    }  # fmt: skip
    folder = chosen.out or Path(__file__).resolve().parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"attention_gpu_{name.replace(' ', '_')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Attention kernels on a GPU: speed beside PyTorch's flash attention, flex attention and eager, once they are right.

    hf-ext bench attention_gpu                 on a GPU, into benchmarks/results/attention_gpu_DEVICE.json
    TRITON_INTERPRET=1 hf-ext bench attention_gpu --dry-run    on the CPU: tiny shapes, every path, no figures

Each shape is first held against float64 at its first and last queries; a shape that is wrong ends the run with an
error, and nothing is timed. Speeds are TFLOP/s of the pairs that see each other, also as a share of what a large
matrix product reaches on the same device just before. What was measured is written down after every step, the most
telling steps first; when the time is up, or where another's way fails, the record says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hf_ext.attention import AttentionStructure
from hf_ext.attention.blocks import kernel_arguments
from hf_ext.benchmarks import on_gpu
from hf_ext.benchmarks.on_gpu import Clock, demand
from hf_ext.kernels.attention import attention, attention_reference
from hf_ext.kernels.column_sums import column_sums, column_sums_reference
from hf_ext.kernels.decode_attention import decode_attention


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


def check(shape: Shape, tensors: list[torch.Tensor], structure: AttentionStructure, out: torch.Tensor) -> None:
    """Hold the first and the last queries of a group of heads against float64."""
    group, some = shape.heads // shape.key_heads, min(128, shape.tokens)
    query, key, value = (t[:1, :n].double() for t, n in zip(tensors, (group, 1, 1), strict=True))
    for place in (slice(0, some), slice(shape.tokens - some, shape.tokens)):
        fields = structure.queries.map(lambda field, place=place: field[:, place])
        part = AttentionStructure(fields, structure.keys, structure.window)
        expected, _ = attention_reference(query[:, :, place], key, value, structure=part)
        demand(f"attention of {shape} at {place}", out[:1, :group, place], expected)


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
        # Compiled anew for every problem: otherwise the later ones get dynamic shapes, and then none at all.
        torch.compiler.reset()
        flex, seen = torch.compile(flex_attention, dynamic=False), structure.mask_function()
        blocks = create_block_mask(seen, None, None, shape.tokens, shape.tokens, device=device, _compile=True)
        found["flex"] = lambda q, k, v: flex(q, k, v, block_mask=blocks, enable_gqa=True)
    else:  # flex attention has no gradients on the CPU
        found["flex"] = lambda q, k, v: attention_reference(q, k, v, structure=structure)[0]

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if device.type == "cuda" else [SDPBackend.MATH]):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return found | ({"flash": flash} if plain else {})


def attempt(function: Callable[[], Any], rows: list[dict[str, Any]], row: dict[str, Any]) -> Any:
    """Return what another's function returns; if it fails, None, and its row says how."""
    try:
        return function()
    except Exception as failure:  # whatever it is, it is no failure of ours
        rows.append({**row, "failed": f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0][:200]}"})
        return None


def attend(
    shape: Shape, name: str, structure: AttentionStructure, device: torch.device, dtype: torch.dtype, clock: Clock,
    best: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the speeds of all ways on one shape, forward and backward."""
    tensors = shape.tensors(device, dtype)
    ways = rivals(structure, shape, name == "causal", device)
    check(shape, tensors, structure, ways["hf_ext"](*tensors))
    rows: list[dict[str, Any]] = []

    def gradients_of(way: str) -> Any:
        return gradients(ways[way], tensors)()

    own, checked = gradients_of("hf_ext"), False
    for way in [way for way in ways if way != "hf_ext"]:
        row = {"what": name, **asdict(shape), "way": way}
        expected = attempt(partial(gradients_of, way), rows, row)
        if expected is None:
            del ways[way]
            continue
        for what, a, b in zip(("query", "key", "value"), own, expected, strict=True):
            demand(f"gradient of the {what} of {shape}, beside that of {way},", a, b.double())
        checked = True
    del own
    expected = None
    pairs = float(structure.dense().float().mean()) if shape.tokens <= 8192 else 0.5
    flops = 4 * shape.batch * shape.heads * shape.tokens**2 * shape.width * pairs / 1e12
    for way, function in ways.items():
        with torch.no_grad():
            timed = [("forward", clock(partial(function, *tensors)), flops)]
        if checked:
            timed.append(("backward", clock(gradients(function, tensors)), 2.5 * flops))
        for direction, seconds, work in timed:
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
    rows: list[dict[str, Any]] = []
    for way, function in (("hf_ext", ours), ("eager", eager)):
        row = {"what": "column sums", **asdict(shape), "way": way}
        if way != "hf_ext" and attempt(function, rows, row) is None:
            continue
        taken = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            function()
            torch.cuda.synchronize(device)
            taken = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        with torch.no_grad():
            seconds = clock(function)
        rows.append({**row, "ms": seconds * 1e3, "mib": taken})
    return rows


def steps(
    device: torch.device, dtype: torch.dtype, clock: Clock, best: float, tiny: bool
) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """Yield what is to be measured, the most telling first, each with its name."""
    shapes, structured = (TINY, TINY) if tiny else (SHAPES, STRUCTURED)
    decoded, summed = (TINY, TINY) if tiny else (DECODED, SUMMED)

    def attention_of(shape: Shape, name: str) -> Callable[[], list[dict[str, Any]]]:
        structure = structures(shape.tokens, device)[name]
        return lambda: attend(shape, name, structure, device, dtype, clock, best)

    yield f"causal, {shapes[0]}", attention_of(shapes[0], "causal")
    for shape in structured:
        for name in structures(8, torch.device("cpu")):
            if name != "causal" and (not tiny or name in ("padding", "segments")):
                yield f"{name}, {shape}", attention_of(shape, name)
    for shape in summed:
        yield f"column sums, {shape}", partial(sum_columns, shape, device, dtype, clock)
    for shape in decoded:
        yield f"decoding, {shape}", partial(decode, shape, device, dtype, clock)
    for shape in shapes[1:]:
        yield f"causal, {shape}", attention_of(shape, "causal")


def measure(
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock,
    tiny: bool = False,
    seconds: float = float("inf"),
    save: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Return all figures, or raise a CliError at the first wrong result.

    Args:
        device: where.
        dtype: of queries, keys and values.
        clock: times functions.
        tiny: go through everything on tiny shapes.
        seconds: after so many nothing new is begun.
        save: gets what there is after every step.
    """
    best = peak(device, dtype, clock)

    def saved(found: dict[str, Any]) -> None:
        found["aims"] = aims(found["rows"])
        save(found)

    return on_gpu.in_time(steps(device, dtype, clock, best, tiny), {"peak_tflops": best, "aims": []}, seconds, saved)


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how many times as fast as another's way ours is, where there is an aim.

    Within 10 % of flash attention for plain causal attention, ahead of flex attention for every structure, column
    sums five times as fast as eager's.
    """
    wanted = {"flash": 0.9, "flex": 1.0, "eager": 5.0}
    places = ("what", "batch", "heads", "key_heads", "tokens", "width", "direction")
    ours = {tuple(row.get(p) for p in places): row["ms"] for row in rows if row["way"] == "hf_ext"}
    found = []
    for row in rows:
        place = tuple(row.get(p) for p in places)
        aimed = row["way"] in wanted and (row["what"] == "causal") == (row["way"] == "flash")
        if aimed and "ms" in row and place in ours:
            times = row["ms"] / ours[place]
            at = {p: value for p, value in zip(places, place, strict=True) if value is not None}
            found.append({**at, "beside": row["way"], "times_as_fast": times, "aim": wanted[row["way"]],
                          "reached": times >= wanted[row["way"]]})  # fmt: skip
    return found


def show(found: dict[str, Any]) -> None:
    """Print the figures and how they stand to the aims."""
    print(f"a large matrix product reaches {found['peak_tflops']:.0f} TFLOP/s")
    on_gpu.table(["what", "batch", "tokens", "width", "direction", "way", "ms", "tflops", "share_of_peak", "gb_per_s",
                  "mib", "failed"], found["rows"])  # fmt: skip
    on_gpu.table(["what", "tokens", "width", "direction", "beside", "times_as_fast", "aim", "reached"], found["aims"])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables and write the record, which has the device's name in its own."""
    on_gpu.run("attention_gpu", __doc__ or "", measure, show, argv)


if __name__ == "__main__":
    main()

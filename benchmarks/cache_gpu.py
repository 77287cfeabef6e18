"""Kernels of caches on a GPU: speed beside the eager way and beside the memory's bandwidth, once they are right.

    hf-ext bench cache_gpu                 on a GPU, into benchmarks/results/cache_gpu_DEVICE.json
    TRITON_INTERPRET=1 hf-ext bench cache_gpu --dry-run    on the CPU: tiny shapes, every path, no figures

Each result is first held against its definition in float64; one that is wrong ends the run with an error, and nothing
of it is timed. All these operations wait for memory: speeds are gigabytes a second of what must be read and written at
least, also as a share of what a large copy reaches on the same device just before. The eager way may well move more
than it must: that is what it is compared for. What is known is written after each shape, so that a run which is cut off
has not been for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_ext.benchmarks import on_gpu
from hf_ext.benchmarks.on_gpu import Clock, demand
from hf_ext.kernels.compaction import compact, compact_ragged, compact_ragged_reference, compact_reference
from hf_ext.kernels.decode_attention import decode_attention
from hf_ext.kernels.merge_entries import merge_entries, merge_entries_reference
from hf_ext.kernels.packed_attention import packed_attention, packed_attention_reference
from hf_ext.kernels.packing import dequantise_keys, dequantise_values, quantise_keys, quantise_values
from hf_ext.kernels.ragged_attention import ragged_attention, ragged_attention_reference

Ways = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Shape:
    """A cache: rows, heads of queries, key heads, tokens and the width of a head."""

    rows: int
    heads: int
    key_heads: int
    tokens: int
    width: int

    def cache(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a query of one token, keys and values."""
        generator = torch.Generator(device).manual_seed(0)

        def made(heads: int, tokens: int) -> torch.Tensor:
            return torch.randn(
                self.rows, heads, tokens, self.width, device=device, generator=generator
            ).to(dtype)  # fmt: skip

        return made(self.heads, 1), made(self.key_heads, self.tokens), made(self.key_heads, self.tokens)

    def chosen(self, device: torch.device, kept: int) -> torch.Tensor:
        """Return an index of so many entries of each head, ascending."""
        generator = torch.Generator(device).manual_seed(1)
        scores = torch.rand(self.rows, self.key_heads, self.tokens, device=device, generator=generator)
        return scores.topk(kept).indices.sort(-1).values

    def lengths(self, device: torch.device) -> torch.Tensor:
        """Return what heads keep: a quarter on the average, some four times as much as others."""
        spread = torch.linspace(0.1, 0.4, self.key_heads, device=device)
        return (spread * self.tokens).long().clamp_min(1).expand(self.rows, -1).contiguous()


SHAPES = [Shape(1, 32, 8, 16384, 128), Shape(8, 32, 8, 8192, 128), Shape(16, 32, 8, 4096, 64)]
TINY = [Shape(1, 4, 2, 32, 32)]
GROUP = 32


def sizes(*tensors: torch.Tensor) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def bandwidth(device: torch.device, clock: Clock) -> float:
    """Return the GB/s that a large copy reads and writes."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**12, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock(lambda: target.copy_(source)) / 1e9


def moved(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Ways, int]:
    """Keep a quarter of the entries of keys, values, positions and scores."""
    _, keys, values = shape.cache(device, dtype)
    positions = torch.arange(shape.tokens, device=device).expand(keys.shape[:3]).contiguous()
    tensors = (keys, values, positions, keys[..., 0].float())
    index = shape.chosen(device, shape.tokens // 4)

    def eager() -> list[torch.Tensor]:
        wide = index[..., None].expand(-1, -1, -1, shape.width)
        return [tensor.gather(2, wide if tensor.ndim == 4 else index) for tensor in tensors]

    found = compact(tensors, index)
    names = ("keys", "values", "positions", "scores")
    for name, a, b in zip(names, found, compact_reference(tensors, index), strict=True):
        demand(f"{name} of the compaction of {shape}", a, b.double())
    size = 2 * sizes(*found) + sizes(index)
    return {"hf_ext": lambda: compact(tensors, index), "gather, one by one": eager}, size


def moved_ragged(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Ways, int]:
    """Keep of each head as many entries as it has, without gaps."""
    _, keys, values = shape.cache(device, dtype)
    lengths = shape.lengths(device)
    index = shape.chosen(device, int(lengths.max()))
    total = int(lengths.sum())
    found = compact_ragged((keys, values), index, lengths, total=total)
    expected = compact_ragged_reference((keys, values), index, lengths)
    for name, a, b in zip(("keys", "values"), found, expected, strict=True):
        demand(f"{name} of the ragged compaction of {shape}", a, b.double())
    ways: Ways = {
        "hf_ext": lambda: compact_ragged((keys, values), index, lengths, total=total),
        "by a mask": lambda: compact_ragged_reference((keys, values), index, lengths),
    }
    return ways, 2 * sizes(*found) + 8 * total


def ragged(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Ways, int]:
    """Decode over heads that keep different numbers of entries, beside a dense cache and a mask."""
    query, keys, values = shape.cache(device, dtype)
    lengths = shape.lengths(device)
    longest = int(lengths.max())
    index = shape.chosen(device, longest)
    flat_keys, flat_values = compact_ragged((keys, values), index, lengths)
    starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view(lengths.shape)
    padded_keys, padded_values = compact((keys, values), index)
    mask = (torch.arange(longest, device=device) < lengths[..., None]).repeat_interleave(
        shape.heads // shape.key_heads, 1
    )[:, :, None]
    expected, _ = ragged_attention_reference(
        query[:1].double(), flat_keys.double(), flat_values.double(), starts[:1], lengths[:1]
    )
    demand(
        f"ragged attention of {shape}",
        ragged_attention(query, flat_keys, flat_values, starts, lengths)[0][:1],
        expected,
    )
    ways: Ways = {
        "hf_ext": lambda: ragged_attention(query, flat_keys, flat_values, starts, lengths),
        "sdpa, padded": lambda: scaled_dot_product_attention(
            query, padded_keys, padded_values, attn_mask=mask, enable_gqa=True
        ),
        "sdpa, all kept": lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True),
    }
    return ways, sizes(flat_keys, flat_values, query)


def packed(bits: int) -> Callable[[Shape, torch.device, torch.dtype], tuple[Ways, int]]:
    """Return what decodes over packed codes, beside dequantising all of them and beside a cache that is not packed."""

    def made(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Ways, int]:
        query, keys, values = shape.cache(device, dtype)
        codes = (*quantise_keys(keys, bits, GROUP), *quantise_values(values, bits, GROUP))
        first = [tensor[:1] for tensor in (query.double(), *codes)]
        expected, _ = packed_attention_reference(first[0], *first[1:], bits=bits)
        demand(f"{bits}-bit attention of {shape}", packed_attention(query, *codes, bits=bits)[0][:1], expected)

        def eager() -> torch.Tensor:
            all_keys = dequantise_keys(*codes[:3], bits=bits)
            all_values = dequantise_values(*codes[3:], bits=bits)
            return scaled_dot_product_attention(query, all_keys, all_values, enable_gqa=True)

        ways: Ways = {
            "hf_ext": lambda: packed_attention(query, *codes, bits=bits),
            "dequantised, sdpa": eager,
            "hf_ext, not packed": lambda: decode_attention(query, keys, values),
        }
        return ways, sizes(*codes, query)

    return made


def merged(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Ways, int]:
    """Merge entries to a quarter as many."""
    _, keys, values = shape.cache(device, dtype)
    generator = torch.Generator(device).manual_seed(2)
    count = shape.tokens // 4
    sets = torch.randint(0, count, keys.shape[:3], device=device, generator=generator).sort(-1).values
    weights = torch.rand(keys.shape[:3], device=device, generator=generator) + 0.1
    found = merge_entries(keys, values, weights, sets, count)
    expected = merge_entries_reference(keys.double(), values.double(), weights, sets, count)
    for name, a, b in zip(("keys", "values", "masses"), found, expected, strict=True):
        demand(f"{name} merged from {shape}", a, b.double())
    ways: Ways = {
        "hf_ext": lambda: merge_entries(keys, values, weights, sets, count),
        "index_add": lambda: merge_entries_reference(keys, values, weights, sets, count),
    }
    return ways, sizes(keys, values, weights, sets, *found)


MEASURED: dict[str, Callable[[Shape, torch.device, torch.dtype], tuple[Ways, int]]] = {
    "compact": moved,
    "compact, ragged": moved_ragged,
    "ragged attention": ragged,
    "2-bit attention": packed(2),
    "4-bit attention": packed(4),
    "merge entries": merged,
}


def compare(
    name: str, shape: Shape, device: torch.device, dtype: torch.dtype, clock: Callable[[Callable[[], Any]], float],
    best: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the speeds of all ways of one operation on one shape, or raise a CliError if a result is wrong."""
    ways, size = MEASURED[name](shape, device, dtype)
    rows = []
    for way, function in ways.items():
        with torch.no_grad():
            seconds = clock(function)
        speed = size / seconds / 1e9
        rows.append(
            {"what": name, **asdict(shape), "way": way, "ms": seconds * 1e3, "gb_per_s": speed,
             "share_of_copy": speed / best}
        )  # fmt: skip
    return rows


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
        device: on which to measure.
        dtype: of keys and values.
        clock: times functions.
        tiny: whether shapes are tiny, to go through everything.
        seconds: after so many nothing new is begun.
        save: gets what there is after every step.
    """
    copy = bandwidth(device, clock)
    steps = (
        (f"{name}, {shape}", partial(compare, name, shape, device, dtype, clock, copy))
        for shape in (TINY if tiny else SHAPES)
        for name in MEASURED
    )
    return on_gpu.in_time(steps, {"copy_gb_per_s": copy}, seconds, save)


def show(found: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"a large copy reaches {found['copy_gb_per_s']:.0f} GB/s")
    columns = ["what", "rows", "key_heads", "tokens", "width", "way", "ms", "gb_per_s", "share_of_copy"]
    on_gpu.table(columns, found["rows"])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the record, which has the device's name in its own."""
    on_gpu.run("cache_gpu", __doc__ or "", measure, show, argv)


if __name__ == "__main__":
    main()

"""Decoding over packed codes beside transformers' QuantizedCache at equal bits, and beside a full cache.

    python -m hf_ext.benchmarks.quantised_decode --write

needs optimum-quanto and hqq, which are no dependencies of this package; a backend that is not installed is said to
be missing. All caches hold the same prompt and take turns, a run of tokens each, the order changing from round to
round. The time of a token is the median over the tokens of a round, which leaves out the steps in which either
cache quantises; those are in the mean. A ratio is the median over rounds of the ratio within a round, with its 95 %
bootstrap interval.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from hf_ext.cache import KIVI, CompressedCache
from hf_ext.cli.output import CliError, print_table, quiet
from hf_ext.kernels import packed_native
from hf_ext.verify.stamp import hardware, versions

COLUMNS = ("key heads", "tokens", "bits", "cache", "median ms", "mean ms", "times as fast", "95 %", "bytes")
#: Of all caches alike.
GROUP, RESIDUAL = 64, 128
#: The packages of transformers' backends.
PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq"}
FULL, OURS = "full", "hf_ext"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="quantised_decode", description=(__doc__ or "").partition("\n")[0])
    add = found.add_argument
    add("--key-heads", type=int, nargs="+", default=[2, 8], help="of width 64 if there are 2, else 128")
    add("--lengths", type=int, nargs="+", default=[2000, 8000], help="tokens of the prompt")
    add("--bits", type=int, nargs="+", default=[2, 4, 8])
    add("--rounds", type=int, default=12)
    add("--tokens", type=int, default=12, help="tokens of a run")
    add("--threads", type=int, default=2)
    add("--json", type=Path, metavar="FILE", help="write the record there")
    add("--write", action="store_true", help="write benchmarks/results/quantised_decode.json and .md of this checkout")
    add("--quick", action="store_true", help="a short prompt and two rounds")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the record.

    Raises:
        CliError: an option cannot be honoured.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    if options.quick:
        options.key_heads, options.lengths, options.rounds, options.tokens = [2], [300], 2, 3
    if options.rounds < 2 or options.tokens < 1:
        raise CliError("--rounds must be 2 at least, and --tokens 1")
    folder = Path(__file__).parent / "results" if options.write else None
    if folder is not None and not folder.is_dir():
        raise CliError("--write needs a checkout of the repository")
    quiet()
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        rows = [
            row
            for heads in options.key_heads for length in options.lengths for bits in options.bits
            for row in measure(heads, length, bits, options)
        ]  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    missing = [name for name in PACKAGES if not installed(name)]
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python -m hf_ext.benchmarks.quantised_decode", *argv]),
        "hardware": hardware(), "versions": versions(), "threads": options.threads, "rounds": options.rounds,
        "kernel": packed_native.in_use(), "missing": missing, "rows": rows,
    }  # fmt: skip
    print_table(COLUMNS, map(cells, rows))
    print(f"products of packed codes: {record['kernel']}")
    if missing:
        print(f"not installed: {', '.join(missing)}")
    text = json.dumps(record, indent=1) + "\n"
    if options.json is not None:
        options.json.write_text(text)
    if folder is not None:
        (folder / "quantised_decode.json").write_text(text)
        (folder / "quantised_decode.md").write_text(markdown(record))


def installed(backend: str) -> bool:
    """Tell whether a backend of transformers' QuantizedCache can be used."""
    try:
        return importlib.util.find_spec(PACKAGES[backend]) is not None
    except ModuleNotFoundError:
        return False


def model_of(key_heads: int, room: int) -> LlamaForCausalLM:
    """Return a random model of two layers with four query heads for each key head, narrow but for its attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4 * key_heads, num_key_value_heads=key_heads, head_dim=64 if key_heads == 2 else 128,
        max_position_embeddings=room,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def caches(model: Any, bits: int) -> dict[str, Any]:
    """Return the empty caches that are compared, by name."""
    found: dict[str, Any] = {FULL: DynamicCache(config=model.config)}
    ours = KIVI(bits=bits, group=GROUP, channels=GROUP, residual=RESIDUAL, guard=False)
    found[OURS] = CompressedCache(model.config, ours)
    for backend, allowed, axes in (("quanto", (2, 4), (0, 0)), ("hqq", (2, 4, 8), (1, 1))):
        if bits in allowed and installed(backend):
            found[f"QuantizedCache, {backend}"] = QuantizedCache(
                backend, model.config, nbits=bits, axis_key=axes[0], axis_value=axes[1], q_group_size=GROUP,
                residual_length=RESIDUAL,
            )  # fmt: skip
    return found


def bytes_of(cache: Any) -> int | None:
    """Return what a cache holds; None for a QuantizedCache, whose tensors lie in the backend's own objects."""
    if isinstance(cache, CompressedCache):
        return cache.resident_bytes()
    if isinstance(cache, QuantizedCache):
        return None
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values))


@torch.no_grad()
def measure(key_heads: int, length: int, bits: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all caches in turns after a prompt of a length."""
    model = model_of(key_heads, length + options.tokens * (options.rounds + 2))
    ids = torch.randint(2, 1024, (1, length), generator=torch.Generator().manual_seed(0))
    held = caches(model, bits)
    token: dict[str, torch.Tensor] = {}
    for name, cache in held.items():
        model.set_attn_implementation("hf_ext" if name == OURS else "sdpa")
        model(ids, past_key_values=cache, logits_to_keep=1)
        token[name] = ids[:, -1:]
    medians: dict[str, list[float]] = {name: [] for name in held}
    means: dict[str, list[float]] = {name: [] for name in held}
    order = list(held)
    shuffle = random.Random(0)
    for turn in range(options.rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            model.set_attn_implementation("hf_ext" if name == OURS else "sdpa")
            spent = timed(functools.partial(model, token[name], past_key_values=held[name]), options.tokens)
            if turn:  # the first round warms up
                medians[name].append(statistics.median(spent))
                means[name].append(statistics.mean(spent))
    found = []
    for name, cache in held.items():
        ratios = [theirs / ours for theirs, ours in zip(medians[name], medians[OURS], strict=True)]
        draw = random.Random(0)
        spread = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
        found.append({
            "key_heads": key_heads, "tokens": length, "bits": bits, "cache": name,
            "median_ms": round(statistics.median(medians[name]) * 1e3, 3),
            "mean_ms": round(statistics.mean(means[name]) * 1e3, 3), "ratio": round(statistics.median(ratios), 3),
            "interval": [round(spread[50], 3), round(spread[1949], 3)], "bytes": bytes_of(cache),
        })  # fmt: skip
    return found


def timed(run: Callable[[], Any], times: int) -> list[float]:
    """Return the seconds of each of some runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of the table; how many times as fast hf_ext is as this cache."""
    ratio = ("", "") if row["cache"] == OURS else (f"{row['ratio']:.2f}", "{:.2f} to {:.2f}".format(*row["interval"]))
    size = "" if row["bytes"] is None else f"{row['bytes']:,}"
    return (
        str(row["key_heads"]), str(row["tokens"]), str(row["bits"]), row["cache"], f"{row['median_ms']:.2f}",
        f"{row['mean_ms']:.2f}", *ratio, size,
    )  # fmt: skip


def markdown(record: dict[str, Any]) -> str:
    """Return a record as a page."""
    where = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Decoding with quantised caches on the CPU",
        "",
        f"{record['hardware']['cpu']}, {record['hardware']['cores']} cores, {record['threads']} threads; {where}; "
        f"{record['date']}.",
        "",
        f"```\n{record['command']}\n```",
        "",
        "Random Llamas of 2 layers and hidden width 256 with 2 key heads of width 64, or 8 of width 128, and four",
        f"query heads for each; float32, one row. Groups of {GROUP}, {RESIDUAL} tokens in full precision, for all",
        f"caches alike. Products of packed codes: {record.get('kernel', 'torch')}.",
        "The time is that of the whole model. *Times as fast*: the time of that cache over that of",
        f"`hf_ext`, the median over {record['rounds']} rounds, with its 95 % bootstrap interval.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|--:|--:|--:|---|--:|--:|--:|---|--:|",
    ]
    rows = ["| " + " | ".join(cells(row)) + " |" for row in record["rows"]]
    missing = [f"\nNot installed: {', '.join(record['missing'])}."] if record["missing"] else []
    return "\n".join([*lines, *rows, *missing]) + "\n"


if __name__ == "__main__":
    main()

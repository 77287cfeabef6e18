"""Attention on the CPU: `"hf_ext"` beside `"sdpa"`, structured prompts, and statistics beside eager's matrix.

    hf-ext bench attention --write

The ways that are compared take turns on one and the same model, the order changing from round to round. A
ratio is the median over rounds of the ratio within a round, with its 95 % bootstrap interval; beside it that
of processor time, which other processes hardly change. Nothing is timed before the outputs were found to be
the same.
"""

from __future__ import annotations

import argparse
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
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_ext import demo
from hf_ext.attention import AttentionStructure, collect, masks_for
from hf_ext.benchmarks import records
from hf_ext.cli.output import CliError, print_table, quiet
from hf_ext.verify.stamp import hardware, versions

COLUMNS = ("what", "baseline", "ms", "hf_ext ms", "ratio", "95 %", "CPU ratio")
#: What is timed: runs something once.
Way = Callable[[], Any]
#: What gets ready for it, without being timed.
Ready = Callable[[], Way]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="hf-ext bench attention", description=(__doc__ or "").partition("\n")[0])
    add = found.add_argument
    add("--rounds", type=int, default=25, help="rounds in which all ways take turns")
    add("--length", type=int, default=512, help="tokens of a plain prompt")
    add("--structured", type=int, default=960, help="tokens of a structured prompt")
    add("--segments", type=int, default=8, help="of a structured prompt")
    add("--tokens", type=int, default=32, help="tokens decoded one by one in a run")
    add("--threads", type=int, default=2)
    add("--json", type=Path, metavar="FILE", help="write the record there")
    add("--write", action="store_true", help="write benchmarks/results/attention.json and .md of this checkout")
    add("--quick", action="store_true", help="embedded model, short prompts, two rounds")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the record.

    Raises:
        CliError: an option cannot be honoured, or outputs differ.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    if options.quick:
        options.rounds, options.length, options.structured, options.tokens = 2, 48, 96, 4
    if options.rounds < 2 or options.segments < 1 or options.structured < 2 * options.segments + 2:
        raise CliError("--rounds must be 2 at least, and --structured have room for --segments")
    folder = records.results() if options.write else None
    quiet()
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        rows = [row for name, model in _models(options.quick) for row in _rows(name, model, options)]
    finally:
        torch.set_num_threads(threads)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["hf-ext bench attention", *argv]),
        "hardware": hardware(),
        "versions": versions(),
        "threads": options.threads,
        "rounds": options.rounds,
        "rows": rows,
    }
    print_table(COLUMNS, map(_cells, rows))
    text = json.dumps(record, indent=1) + "\n"
    for path in filter(None, [options.json, folder and folder / "attention.json"]):
        records.write(path, text)
    if folder is not None:
        records.write(folder / "attention.md", markdown(record))


def markdown(record: dict[str, Any]) -> str:
    """Return a record as a page."""
    where = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Attention on the CPU",
        "",
        f"{record['hardware']['cpu']}, {record['hardware']['cores']} cores, {record['threads']} threads; {where}; "
        f"{record['date']}.",
        "",
        f"```\n{record['command']}\n```",
        "",
        f"Medians of {record['rounds']} rounds in which both ways take turns. *Ratio* is `hf_ext` to the baseline, the",
        "median of the ratios within a round, with its 95 % bootstrap interval; below 1, `hf_ext` is faster.",
        "*CPU ratio* is the same of processor time, which other processes hardly change. The time of a structured",
        "prompt includes the making of its mask. All outputs were the same before anything was timed.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|--:|--:|--:|---|--:|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in record["rows"])]) + "\n"


def compare(baseline: Ready, own: Ready, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Time two ways in turns.

    Args:
        baseline: gets one way ready.
        own: gets the other ready.
        rounds: in each, both run once.
        seed: of the bootstrap.

    Returns:
        `baseline_ms`, `own_ms`, `ratio` and its `interval`, and `cpu_ratio`, that of processor time.
    """
    times: tuple[list[float], list[float]] = ([], [])
    cpu: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            run = (baseline, own)[which]()
            start, before = time.perf_counter(), time.process_time()
            run()
            times[which].append(time.perf_counter() - start)
            cpu[which].append(time.process_time() - before)
    first, second = times[0][1:], times[1][1:]  # the first round warms up
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    cpu_ratios = [b / a for a, b in zip(cpu[0][1:], cpu[1][1:], strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "baseline_ms": round(statistics.median(first) * 1e3, 3),
        "own_ms": round(statistics.median(second) * 1e3, 3),
        "ratio": round(statistics.median(ratios), 4),
        "interval": [round(medians[50], 4), round(medians[1949], 4)],
        "cpu_ratio": round(statistics.median(cpu_ratios), 4),
    }


def _models(quick: bool) -> list[tuple[str, Any]]:
    embedded = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32).eval()
    if quick:
        return [("embedded", embedded)]
    torch.manual_seed(0)
    wide = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=1024, max_position_embeddings=2048,
    )  # fmt: skip
    return [("embedded", embedded), ("wide", LlamaForCausalLM(wide).eval())]


@torch.no_grad()
def _rows(name: str, model: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    ids = torch.randint(2, model.config.vocab_size, (1, options.structured), generator=torch.Generator().manual_seed(0))
    plain = ids[:, : options.length]
    padded = torch.ones_like(plain)
    padded[:, : options.length // 8] = 0
    segments = _segments(options.structured, options.segments)
    structure = AttentionStructure.causal(torch.ones_like(ids)).segments(segments)

    def read(mask: Any = None, text: torch.Tensor = plain, positions: Any = None) -> torch.Tensor:
        return model(text, attention_mask=mask, position_ids=positions, use_cache=False).logits

    def structured(dense: bool) -> torch.Tensor:
        mask = structure.dense() if dense else masks_for(model, structure)
        return read(mask, ids, structure.queries.position.long())

    decode = _decoder(model, plain[:, : min(128, options.length)], options.tokens)
    pairs: list[tuple[str, str, Way, Way]] = [
        (f"prompt of {options.length}", "sdpa", read, read),
        (f"padded prompt of {options.length}", "sdpa", lambda: read(padded), lambda: read(padded)),
        (f"{options.tokens} tokens one by one", "sdpa", decode, decode),
        (f"{options.segments} segments of {options.structured}", "sdpa, dense mask",
         lambda: structured(True), lambda: structured(False)),
    ]  # fmt: skip
    found = []
    for what, baseline, first, second in pairs:
        found.append({"what": f"{name}: {what}", "baseline": baseline,
                      **_checked(model, ("sdpa", first), ("hf_ext", second), options.rounds)})  # fmt: skip
    sums = ("eager", lambda: _sums(model, plain)), ("hf_ext", lambda: _collected(model, plain))
    found.append({"what": f"{name}: column sums of {options.length}", "baseline": "eager, its matrix",
                  **_checked(model, *sums, options.rounds)})  # fmt: skip
    return found


def _checked(model: Any, first: tuple[str, Way], second: tuple[str, Way], rounds: int) -> dict[str, Any]:
    def under(name: str, way: Way) -> Ready:
        def ready() -> Way:
            model.set_attn_implementation(name)
            return way

        return ready

    baseline, own = under(*first), under(*second)
    difference = float((baseline()() - own()()).abs().max())
    if difference > (1e-4 if first[0] == "eager" else 0):
        raise CliError(f"{second[0]} and {first[0]} differ by {difference}; nothing is timed")
    return {**compare(baseline, own, rounds), "largest_difference": difference}


def _decoder(model: Any, context: torch.Tensor, tokens: int) -> Way:
    """Return what decodes some tokens after a context that has been read before."""
    cache = DynamicCache(config=model.config)
    first = model(context, past_key_values=cache).logits[:, -1:].argmax(-1)

    def decode() -> torch.Tensor:
        token, logits = first, []
        for _ in range(tokens):
            logits.append(model(token, past_key_values=cache).logits[:, -1])
            token = logits[-1].argmax(-1, keepdim=True)
        cache.crop(-tokens)
        return torch.stack(logits)

    return decode


def _segments(length: int, count: int) -> torch.Tensor:
    """Return segments of equal length between a prefix and a suffix of a sixteenth each."""
    edge = max(length // 16, 1)
    inside = torch.arange(length - 2 * edge) * count // (length - 2 * edge) + 1
    return torch.nn.functional.pad(inside, (edge, edge))[None]


def _sums(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Column sums from the matrices of eager attention, reduced over the group of each key head."""
    groups = model.config.num_key_value_heads
    matrices = model(ids, output_attentions=True, use_cache=False).attentions
    return torch.stack([matrix.sum(2).unflatten(1, (groups, -1)).sum(2) for matrix in matrices])


def _collected(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with collect(model, lse=False) as found:
        model(ids, use_cache=False)
    return torch.stack([call.column_sums for call in found.calls if call.column_sums is not None])


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    return [row["what"], row["baseline"], f"{row['baseline_ms']:.1f}", f"{row['own_ms']:.1f}", f"{row['ratio']:.3f}",
            f"[{low:.3f}, {high:.3f}]", f"{row['cpu_ratio']:.3f}"]  # fmt: skip


if __name__ == "__main__":
    main()

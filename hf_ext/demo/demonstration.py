"""The main job on real input: decode four ways, change the architecture, train, ship, reload.

1. The embedded target continues functions of standard-library files it was not trained on,
   with four ways of decoding side by side.
2. It becomes a SWAN-GPT, trains for some steps with MEAP in a stock Trainer, and is saved with
   its code. A second process without hf_ext loads it and must continue with the same tokens.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from hf_ext import demo
from hf_ext.demo import swan
from hf_ext.demo.prompts import Prompt, prompts
from hf_ext.generation import CautiousDecoding, ContrastiveSearch, DecodingStrategy
from hf_ext.metrics.likelihood import coherence
from hf_ext.metrics.repetition import repetition_diversity

SEED = 0
TEMPERATURE = 0.8


def run(
    report: str | Path | None = None,
    json: bool = False,
    *,
    functions: int = 6,
    new_tokens: int = 96,
    steps: int = 40,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demonstration and return its figures.

    Args:
        report: folder for a Markdown report with plots; None writes none.
        json: print nothing on the console (the caller prints the returned figures).
        functions: how many held-out functions are continued.
        new_tokens: length of each continuation.
        steps: optimizer steps of the fine-tuning.
        console: where to print.

    Returns:
        `{"decoding": [...], "swan": {...}, "seconds": ...}`, ready for JSON.

    Raises:
        RuntimeError: the reloaded model continued with other tokens.
    """
    started = time.perf_counter()
    console = console or Console(stderr=json, quiet=json)
    if report is not None:
        from hf_ext.demo.report import check

        check(Path(report))  # before a minute of work, not after
    with _quiet(), _bar(console) as bar:
        tokenizer = AutoTokenizer.from_pretrained(demo.path("target"))
        target = AutoModelForCausalLM.from_pretrained(demo.path("target"))
        chosen = prompts(functions, tokenizer)
        decoding = compare(target, tokenizer, chosen, new_tokens, bar)
        converted = ship(target, tokenizer, chosen[0], new_tokens, steps, bar)
    figures = {
        "decoding": decoding,
        "swan": converted,
        "prompts": [f"{p.module}:{p.function}" for p in chosen],
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
    }
    _show(console, chosen, figures)
    if report is not None:
        from hf_ext.demo.report import write

        console.print(f"report: {write(Path(report), chosen, figures)}")
    if not converted["identical"]:
        raise RuntimeError("the reloaded model continued with other tokens than the one that was saved")
    return figures


def compare(
    target: PreTrainedModel, tokenizer: Any, chosen: list[Prompt], new_tokens: int, bar: Progress
) -> list[dict[str, Any]]:
    """Continue the prompts in one batch with each way of decoding and measure the texts."""
    batch = tokenizer([p.text for p in chosen], return_tensors="pt", padding=True)
    lengths: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    ways: list[tuple[str, DecodingStrategy | None, dict[str, Any]]] = [
        ("greedy", None, {"do_sample": False}),
        ("sampling", None, {"do_sample": True, "temperature": TEMPERATURE}),
        ("contrastive search", ContrastiveSearch(), {}),
        ("cautious", CautiousDecoding(), {"do_sample": True, "temperature": TEMPERATURE}),
    ]
    target.generate(**batch, max_new_tokens=2, do_sample=False)  # the first call pays for warming up
    task = bar.add_task("decoding", total=len(ways))
    rows = []
    for name, strategy, settings in ways:
        bar.update(task, description=f"decoding: {name}")
        set_seed(SEED)
        start = time.perf_counter()
        if strategy is None:
            out = target.generate(**batch, **lengths, **settings)
        else:
            out = strategy.generate(target, **batch, **lengths, **settings, tokenizer=tokenizer)
        seconds = time.perf_counter() - start
        new = out[:, batch["input_ids"].shape[1] :]
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in new]
        measured = repetition_diversity(new.tolist())
        likelihood = coherence(target, batch_prompts(batch), new.tolist())
        rows.append(
            {
                "name": name,
                "tokens_per_second": round(new.numel() / seconds, 1),
                "rep_4": round(float(measured["rep_4"]), 4),
                "distinct_2": round(float(measured["distinct_2"]), 4),
                "diversity": round(float(measured["diversity"]), 4),
                "perplexity": round(float(likelihood["perplexity"]), 3),
                "texts": texts,
                "report": strategy.report.as_dict() if strategy is not None and strategy.report else None,
            }
        )
        bar.advance(task)
    return rows


def batch_prompts(batch: Any) -> list[list[int]]:
    """Return the prompts of a padded batch as lists of ids without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def ship(
    target: PreTrainedModel, tokenizer: Any, prompt: Prompt, new_tokens: int, steps: int, bar: Progress
) -> dict[str, Any]:
    """Convert, fine-tune, save, reload without hf_ext, and hold the continuations against each other."""
    task = bar.add_task("SWAN-GPT: fine-tuning with MEAP", total=steps + 3)
    length = target.config.max_position_embeddings // 2
    held_out = swan.Windows(tokenizer, length, 48, held_out=True)
    data = swan.Windows(tokenizer, length, steps * 8, held_out=False)
    model = swan.convert(target)
    losses = {"llama": swan.mean_loss(target, held_out), "converted": swan.mean_loss(model, held_out)}
    bar.advance(task)
    ids = tokenizer(prompt.text)["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "swan-gpt"
        log = swan.fine_tune(
            model, tokenizer, data, Path(folder) / "trainer", steps=steps, advance=lambda: bar.advance(task)
        )
        losses["fine_tuned"] = swan.mean_loss(model, held_out)
        model.save_pretrained(saved)
        bar.update(task, description="SWAN-GPT: reloading without hf_ext", advance=1)
        elsewhere = swan.reload_elsewhere(saved, ids, new_tokens)
        files = sorted(path.name for path in saved.iterdir())
    model.eval()
    here = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)[
        0, len(ids) :
    ].tolist()
    bar.advance(task)
    return {
        "layer_types": model.config.layer_types,
        "held_out_loss": {name: round(value, 4) for name, value in losses.items()},
        "steps": steps,
        "log": log,
        "files": files,
        "reloaded_class": elsewhere["class"],
        "identical": here == elsewhere["tokens"],
        "text": tokenizer.decode(here, skip_special_tokens=True),
    }


def _show(console: Console, chosen: list[Prompt], figures: dict[str, Any]) -> None:
    """Print one prompt with its continuations, then the table."""
    first = chosen[0]
    console.rule(f"{first.module}: {first.function}")
    console.print(Text(first.text.rstrip(), style="dim"))
    for row in figures["decoding"]:
        console.rule(row["name"], style="dim")
        console.print(Text(row["texts"][0].strip("\n")))
    console.rule("SWAN-GPT after MEAP, reloaded", style="dim")
    console.print(Text(figures["swan"]["text"].strip("\n")))
    table = Table(title=f"{len(chosen)} held-out functions, one batch, {figures['threads']} threads")
    table.add_column("decoding")
    names = {
        "tokens_per_second": "tokens/s", "rep_4": "rep-4", "distinct_2": "distinct-2", "diversity": "diversity",
        "perplexity": "perplexity",
    }  # fmt: skip
    for title in names.values():
        table.add_column(title, justify="right")
    for row in figures["decoding"]:
        table.add_row(row["name"], *(f"{row[key]:.4g}" for key in names))
    console.print(table)
    losses = figures["swan"]["held_out_loss"]
    console.print(
        f"held-out loss: Llama {losses['llama']:.3f}, converted to SWAN-GPT {losses['converted']:.3f}, "
        f"after {figures['swan']['steps']} MEAP steps {losses['fine_tuned']:.3f} nats/token"
    )
    verdict = "identical tokens" if figures["swan"]["identical"] else "[red]other tokens[/red]"
    console.print(f"second process without hf_ext ({figures['swan']['reloaded_class']}): {verdict}")
    console.print(f"{figures['seconds']} s in all")


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and notices off the console while ours are on it."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    tokenizers_threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if tokenizers_threads is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = tokenizers_threads

"""Loss over a large vocabulary: time and memory without the logits of all tokens, beside logits and cross-entropy.

    hf-ext bench linear_loss --write

Forward and backward of the head and its loss, with gradients for hidden states and weight; of distillations, with the
teacher's head. The ways take turns, the
order changing from round to round; a ratio is the median over rounds of the ratio to the plain way within a round, with
its 95 % bootstrap interval. Memory is by how much the resident memory of a fresh process grew at most, gradients
included. Nothing is timed before losses and gradients were found to agree.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from hf_ext.benchmarks import records
from hf_ext.benchmarks.speculative_measure import peak_memory
from hf_ext.cli.output import CliError, print_table
from hf_ext.kernels.linear_logits import GivenLogits, HeadLogits, Logits
from hf_ext.kernels.linear_loss import TokenStatistics, linear_loss, linear_statistics, statistics_of_logits
from hf_ext.verify.stamp import hardware, versions

COLUMNS = ("loss", "tokens x vocabulary x width", "way", "ms", "ratio", "95 %", "CPU ratio", "MiB", "of plain")
#: What is compared, the first one being what a user would write.
PLAIN, STATISTICS, LOSS, LIGER = "logits", "linear_statistics", "linear_loss", "Liger"
#: Of distillations: one pass over logits that are there, or over those of both heads.
GIVEN, HEADS = "distillation of logits", "distillation of heads"
LOSSES = ("nll", "nll and entropy", "distillation", "ATKD")
#: From hidden states, weight and targets to a sum.
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _nll(found: TokenStatistics, at: slice = slice(None)) -> torch.Tensor:
    return found.nll.sum()


def _with_entropy(found: TokenStatistics, at: slice = slice(None)) -> torch.Tensor:
    assert found.entropy is not None
    return found.nll.sum() - 0.1 * found.entropy.sum()


def _distillations(adaptive: bool) -> dict[str, Way]:
    """Return what is compared for a distillation; the teacher is the student with half of its logits.

    Args:
        adaptive: with the weights of ATKD, for which the teacher's uncertainty has to be known first; the plain way
            then is its formula. Else the divergence of teacher and student, as torch has it.
    """
    # a process that only weighs another loss imports no Trainer
    from hf_ext.trainer_callbacks.atkd import divided_divergence
    from hf_ext.trainer_callbacks.distillation import distillation, odds_of

    temper = 0.5

    def weights(uncertainty: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hard = uncertainty >= uncertainty.median()
        return torch.where(hard, 1.6, 0.0), torch.where(hard, 1.6, 0.4)

    def taught(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden.detach(), weight.detach()).mul_(temper)

    def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        student, teacher = functional.linear(hidden, weight).float(), taught(hidden, weight).float()
        if not adaptive:
            logs = student.log_softmax(-1), teacher.log_softmax(-1)
            return functional.kl_div(*logs, log_target=True, reduction="sum")
        target, rest, uncertainty = divided_divergence(student, teacher, targets)
        on_target, on_rest = weights(uncertainty)
        return (on_target * target + on_rest * rest).sum()

    def by(student: Logits, teacher: Logits, targets: torch.Tensor) -> torch.Tensor:
        if not adaptive:
            return distillation(student, teacher, targets, 1.0, None).total
        return distillation(student, teacher, targets, *weights((-odds_of(teacher, targets)).sigmoid())).total

    def given(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        places = torch.arange(len(targets), device=targets.device)
        student = GivenLogits(functional.linear(hidden, weight), places)
        return by(student, GivenLogits(taught(hidden, weight), places), targets)

    def heads(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return by(HeadLogits(hidden, weight), HeadLogits(hidden.detach(), weight.detach(), scale=temper), targets)

    return {PLAIN: plain, GIVEN: given, HEADS: heads}


def ways(loss: str) -> dict[str, Way]:
    """Return what is compared for one of the `LOSSES`.

    Liger's kernel runs on a GPU only, and is there if its package is.
    """
    if loss in ("distillation", "ATKD"):
        return _distillations(adaptive=loss == "ATKD")
    entropy = loss != "nll"
    of = _with_entropy if entropy else _nll

    def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(hidden, weight)
        if entropy:
            return of(statistics_of_logits(logits, targets, entropy=True))
        return functional.cross_entropy(logits.float(), targets, reduction="sum")

    found: dict[str, Way] = {
        PLAIN: plain,
        STATISTICS: lambda hidden, weight, targets: of(linear_statistics(hidden, weight, targets, entropy=entropy)),
        LOSS: lambda hidden, weight, targets: linear_loss(hidden, weight, targets, of, entropy=entropy),
    }
    if not entropy and torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found[LIGER] = lambda hidden, weight, targets: fused(weight, hidden, targets)
    return found


def problem(tokens: int, vocabulary: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states, weight and targets; on a GPU, in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    hidden = torch.randn(tokens, width, generator=draw).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=draw) * 0.05).to(device, dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=draw).to(device)


def step(way: Way, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the loss and the gradients, which are fresh."""
    hidden.grad = weight.grad = None
    loss = way(hidden, weight, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    if loss.is_cuda:
        torch.cuda.synchronize()
    return loss.detach()


def agree(loss: str, shape: Sequence[int]) -> None:
    """Hold all ways against the plain one.

    Raises:
        CliError: one differs.
    """
    given = problem(*shape)
    expected: list[torch.Tensor] = []
    bound = 1e-4 if given[0].dtype == torch.float32 else 3e-2
    for name, way in ways(loss).items():
        found = [step(way, *given), *(tensor.grad.float() for tensor in given[:2] if tensor.grad is not None)]
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            difference, largest = float((a - b).abs().max()), float(b.abs().max())
            if not difference <= bound * max(largest, 1.0):
                raise CliError(f"{name} differs from {PLAIN} by {difference} of {largest}; nothing is timed")


def timed(loss: str, shape: Sequence[int], rounds: int) -> dict[str, dict[str, Any]]:
    """Time all ways in turns."""
    given = problem(*shape)
    found = ways(loss)
    wall: dict[str, list[float]] = {name: [] for name in found}
    cpu: dict[str, list[float]] = {name: [] for name in found}
    order, shuffle = list(found), random.Random(0)
    for turn in range(rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            start, before = time.perf_counter(), time.process_time()
            step(found[name], *given)
            if turn:  # the first round warms up
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - before)
    rows = {}
    for name in found:
        ratios = [own / plain for own, plain in zip(wall[name], wall[PLAIN], strict=True)]
        draw = random.Random(0)
        spread = sorted(statistics.median(draw.choices(ratios, k=rounds)) for _ in range(2000))
        rows[name] = {
            "ms": round(statistics.median(wall[name]) * 1e3, 2),
            "ratio": round(statistics.median(ratios), 4),
            "interval": [round(spread[50], 4), round(spread[1949], 4)],
            "cpu_ratio": round(
                statistics.median(own / plain for own, plain in zip(cpu[name], cpu[PLAIN], strict=True)), 4
            ),
        }
    return rows


def memory(loss: str, name: str, shape: Sequence[int]) -> float:
    """Return by how many MiB memory grows at most, in a process of its own; of a GPU's memory if there is one."""
    given = json.dumps([loss, name, *shape, torch.get_num_threads()])
    command = [sys.executable, "-m", __name__, "--peak", given]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise CliError(f"measuring the memory of {name} failed: {run.stderr.strip().splitlines()[-1:]}")
    return float(run.stdout.splitlines()[-1])


def _peak(given: str) -> None:
    loss, name, tokens, vocabulary, width, threads = json.loads(given)
    torch.set_num_threads(threads)
    way = ways(loss)[name]
    step(way, *problem(8, 64, width))  # what is allocated once
    inputs = problem(tokens, vocabulary, width)
    if inputs[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(way, *inputs)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    found = peak_memory(lambda: step(way, *inputs))
    if found is None:
        raise SystemExit("this system does not tell how much memory a process has had")
    print(found)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="hf-ext bench linear_loss", description=(__doc__ or "").partition("\n")[0])
    add = found.add_argument
    add("--rounds", type=int, default=11, help="rounds in which all ways take turns")
    add("--tokens", type=int, default=2048)
    add("--vocabulary", type=int, nargs="+", default=[32_000])
    add("--width", type=int, nargs="+", default=[256, 768], help="of the hidden states")
    add("--threads", type=int, default=2)
    add("--json", type=Path, metavar="FILE", help="write the record there")
    add("--write", action="store_true", help="write benchmarks/results/linear_loss.json and .md of this checkout")
    add("--quick", action="store_true", help="small shapes, two rounds")
    add("--peak", help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the record.

    Raises:
        CliError: an option cannot be honoured, or results differ.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    if options.peak is not None:
        _peak(options.peak)
        return
    if options.quick:
        options.rounds, options.tokens, options.vocabulary, options.width = 2, 96, [4000], [16]
    if options.rounds < 2:
        raise CliError("--rounds must be 2 at least: a spread needs two")
    folder = records.results() if options.write else None
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    rows = []
    try:
        for shape in ((options.tokens, v, w) for v in options.vocabulary for w in options.width):
            for loss in LOSSES:
                agree(loss, shape)
                peaks = {name: memory(loss, name, shape) for name in ways(loss)}
                for name, found in timed(loss, shape, options.rounds).items():
                    rows.append({
                        "loss": loss, "tokens": shape[0], "vocabulary": shape[1], "width": shape[2], "way": name,
                        **found, "mib": round(peaks[name], 1),
                        "memory_ratio": round(peaks[name] / max(peaks[PLAIN], 1e-9), 4),
                    })  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["hf-ext bench linear_loss", *argv]),
        "hardware": hardware(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": options.threads,
        "rounds": options.rounds,
        "rows": rows,
    }
    print_table(COLUMNS, map(cells, rows))
    text = json.dumps(record, indent=1) + "\n"
    name = "linear_loss" if record["device"] == "cpu" else "linear_loss_" + record["device"].replace(" ", "_")
    for path in filter(None, [options.json, folder and folder / f"{name}.json"]):
        records.write(path, text)
    if folder is not None:
        records.write(folder / f"{name}.md", markdown(record))


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    low, high = row["interval"]
    return [
        row["loss"], f"{row['tokens']} x {row['vocabulary']} x {row['width']}", row["way"], f"{row['ms']:.1f}",
        f"{row['ratio']:.3f}", f"[{low:.3f}, {high:.3f}]", f"{row['cpu_ratio']:.3f}", f"{row['mib']:.0f}",
        f"{row['memory_ratio']:.3f}",
    ]  # fmt: skip


def markdown(record: dict[str, Any]) -> str:
    """Return a record as a page."""
    where = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Loss over a large vocabulary",
        "",
        f"{record['hardware']['cpu']}, {record['hardware']['cores']} cores, {record['threads']} threads, device "
        f"{record['device']}; {where}; {record['date']}.",
        "",
        f"```\n{record['command']}\n```",
        "",
        "*nll* is cross-entropy, *distillation* the divergence from a teacher, whose head is computed as well, *ATKD*",
        "the same with weights of target and rest that need the teacher's uncertainty of all tokens first.",
        "",
        f"Head and loss, forward and backward, medians of {record['rounds']} rounds in which all ways take turns.",
        "*Ratio* is the time to that of the plain way, the median of the ratios within a round, with its 95 %",
        "bootstrap interval; below 1 is faster. *CPU ratio* is the same of processor time. *MiB* is by how much the",
        "memory of a fresh process grew at most, gradients included. Losses and gradients agreed before anything was",
        "timed.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|---|--:|--:|---|--:|--:|--:|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in record["rows"])]) + "\n"


if __name__ == "__main__":
    main()

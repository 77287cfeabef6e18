"""Running the methods of the speculative benchmark in turns, and checking what they say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_ext.benchmarks.speculative_measure import Passes, peak_memory, timed, weights_memory
from hf_ext.benchmarks.speculative_methods import PLAIN, Call, Method
from hf_ext.benchmarks.speculative_settings import Prompt, Setting
from hf_ext.cli.output import one_line

#: What is reported after each run, for a progress bar.
Tick = Callable[[str], None]


@dataclass
class Sample:
    """One run: which prompt and round, its seconds without those of the target's pass over the prompt, and counts."""

    prompt: int
    round: int
    seconds: float
    calls: int
    positions: int
    draft_calls: int
    partial_work: float
    report: dict[str, Any] | None


@dataclass
class Row:
    """A method with one of the drafts.

    Args:
        method: the method.
        draft: name of its draft model, if it has one.
        status: `"ok"`; `"differs"` where a greedy text is not that of plain `generate`; `"not installed"`,
            `"not for this target"`; or `"failed: ..."`.
        samples: the timed runs.
        memory: MiB that the resident memory grew by at most, and the weights of the draft.
    """

    method: Method
    draft: str | None = None
    status: str = "ok"
    samples: list[Sample] = field(default_factory=list)
    memory: float | None = None
    draft_memory: float = 0.0


def rows_of(setting: Setting, methods: Sequence[Method]) -> list[Row]:
    """Return the rows of a table: plain `generate`, then each method with every draft that it can take."""
    rows = [Row(PLAIN)]
    for method in methods:
        if method.baseline is None and method.strategy_class() is None:
            rows.append(Row(method, status="not installed"))
        elif method.targets is not None and setting.name not in method.targets:
            rows.append(Row(method, status="not for this target"))
        elif method.takes_draft():
            memory = {name: weights_memory(draft) for name, draft in setting.drafts.items()}
            rows += [Row(method, draft=name, draft_memory=memory[name]) for name in setting.drafts]
        else:
            rows.append(Row(method))
    return rows


def sampling(temperature: float) -> dict[str, Any]:
    """Return the settings of `generate` for a temperature; 0 is greedy."""
    return {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}


def runs(setting: Setting, rows: Sequence[Row], rounds: int) -> int:
    """Return how many decoding calls `measure` makes."""
    return sum(row.status == "ok" for row in rows) * (2 + rounds * len(setting.prompts))


def measure(
    setting: Setting, rows: Sequence[Row], temperature: float, tokens: int, draft_tokens: int, rounds: int, tick: Tick
) -> None:
    """Fill in the rows: after a warm-up and a run that is weighed, all methods take turns on every prompt.

    Args:
        setting: models and prompts.
        rows: the table; the first is plain `generate`.
        temperature: 0 for greedy.
        tokens: new tokens of every run.
        draft_tokens: tokens drafted a step.
        rounds: timed runs of each prompt.
        tick: called after each run.
    """
    generate = {"max_new_tokens": tokens, **sampling(temperature)}
    expected: dict[int, torch.Tensor] = {}
    longest = max(range(len(setting.prompts)), key=lambda i: setting.prompts[i].ids.shape[1])

    def check(row: Row, at: int, out: torch.Tensor) -> None:
        if temperature:  # texts may differ, their lengths may not
            wanted = setting.prompts[at].ids.shape[1] + tokens
            if out.shape != (1, wanted):
                raise RuntimeError(f"returned ids of shape {tuple(out.shape)}, expected (1, {wanted})")
        elif row.method is PLAIN:
            expected[at] = out
        elif row.method.exact and not torch.equal(out, expected[at]):
            row.status = "differs"

    def turn(row: Row, at: int, number: int) -> None:
        """Run once; round 0 is the warm-up."""
        try:
            sample, out = _run(setting, row, at, number, generate, draft_tokens)
            check(row, at, out)
        except Exception as error:  # one method that fails must not take the others with it; `main` ends with an error
            row.status = f"failed: {one_line(error)}"
            return
        if number:
            row.samples.append(sample)
        tick(row.method.name)

    def weigh(row: Row) -> None:
        try:
            row.memory = peak_memory(lambda: _run(setting, row, longest, 0, generate, draft_tokens))
        except Exception as error:
            row.status = f"failed: {one_line(error)}"
            return
        tick(row.method.name)

    with torch.random.fork_rng(devices=[]):
        for step in (lambda row: turn(row, longest, 0), weigh):
            for row in rows:
                if row.status == "ok":
                    step(row)
        for number in range(1, rounds + 1):
            for at in range(len(setting.prompts)):
                # Plain comes first, as its text is what the others are compared with; the others rotate.
                others = list(rows[1:])
                start = (number + at) % max(1, len(others))
                for row in [rows[0], *others[start:], *others[:start]]:
                    if row.status == "ok":
                        turn(row, at, number)


def inputs_of(prompt: Prompt) -> dict[str, torch.Tensor]:
    """Return a prompt as inputs of `generate`."""
    return {"input_ids": prompt.ids, "attention_mask": torch.ones_like(prompt.ids)}


def _run(
    setting: Setting, row: Row, at: int, number: int, generate: dict[str, Any], draft_tokens: int
) -> tuple[Sample, torch.Tensor]:
    """Decode one prompt with one method, counted by hooks."""
    draft = setting.drafts[row.draft] if row.draft is not None else None
    call: Call = row.method.call(setting, draft, draft_tokens)
    prompt = setting.prompts[at]
    inputs = {**inputs_of(prompt), **generate}
    torch.manual_seed(1000 * number + at)
    with Passes(setting.target) as target:
        if draft is None:
            (out, report), seconds = timed(lambda: call(**inputs))
            drafted = 0
        else:
            with Passes(draft) as passes:
                (out, report), seconds = timed(lambda: call(**inputs))
            drafted = passes.calls
    if not target.calls:
        raise RuntimeError("it never called the target through all its layers")
    sample = Sample(
        at, number, seconds - target.first_seconds, target.calls,
        target.positions - prompt.ids.shape[1] + 1,  # the prompt costs everybody the same
        drafted + target.partial_calls, target.partial_work, None if report is None else report.as_dict(),
    )  # fmt: skip
    return sample, out


def batches(
    setting: Setting, rows: Sequence[Row], sizes: Sequence[int], tokens: int, draft_tokens: int, rounds: int, tick: Tick
) -> list[dict[str, Any]]:
    """Return tokens a second by batch size: our methods and plain `generate`, greedy, in turns.

    Args:
        setting: models and prompts, which are used again where a batch has more rows.
        rows: the table; baselines other than plain `generate` decode one sequence only and are left out.
        sizes: batch sizes.
        tokens: new tokens of every row.
        draft_tokens: tokens drafted a step.
        rounds: timed runs of each, after one that is not.
        tick: called after each run.
    """
    found = []
    chosen = [row for row in rows if row.status == "ok" and (row.method is PLAIN or row.method.baseline is None)]
    for size in sizes:
        texts = [setting.prompts[i % len(setting.prompts)].ids[0].tolist() for i in range(size)]
        inputs = dict(setting.tokenizer.pad({"input_ids": texts}, padding_side="left", return_tensors="pt"))
        seconds: dict[int, list[float]] = {i: [] for i in range(len(chosen))}
        status = ["ok"] * len(chosen)
        expected: torch.Tensor | None = None
        for number in range(rounds + 1):
            for i, row in enumerate(chosen):
                if status[i] != "ok":
                    continue
                draft = setting.drafts[row.draft] if row.draft is not None else None
                try:
                    call = row.method.call(setting, draft, draft_tokens)
                    with Passes(setting.target) as passes:
                        (out, _), spent = timed(
                            functools.partial(call, **inputs, max_new_tokens=tokens, do_sample=False)
                        )
                except Exception as error:  # as in `measure`
                    status[i] = f"failed: {one_line(error)}"
                    continue
                if row.method is PLAIN:
                    expected = out
                elif row.method.exact and (expected is None or not torch.equal(out, expected)):
                    status[i] = "differs"
                if number:
                    seconds[i].append(size * (tokens - 1) / (spent - passes.first_seconds))
                tick(f"{row.method.name}, batch {size}")
        for i, row in enumerate(chosen):
            rates = sorted(seconds[i]) if status[i] == "ok" else []
            found.append({
                "method": row.method.name, "draft": row.draft, "batch": size, "status": status[i],
                "tokens_per_second": rates[len(rates) // 2] if rates else None,
            })  # fmt: skip
    return found

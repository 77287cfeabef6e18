"""Accuracy of small models with compressed caches against the bytes that the caches hold."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaForCausalLM

from hf_ext.benchmarks import cache_kvpress
from hf_ext.benchmarks.cache_methods import FULL, PRESSES, Method, methods, reason
from hf_ext.benchmarks.cache_models import Recipe, trained
from hf_ext.benchmarks.cache_reading import accuracy, full_bytes, padded_groups, read, ways
from hf_ext.benchmarks.cache_tasks import TASKS, Batch, batch
from hf_ext.cache.budget import tokens_of

#: Seeds of evaluation texts are apart from those of training.
HELD_OUT = 10_000
#: Lengths of the texts of a padded batch, as shares of the longest, and the task, budget and groups of that part.
SHARES, PADDED_TASK, PADDED_BUDGET, GROUPS = (1.0, 0.8, 0.6, 0.5), "needle", 0.5, 8
Cell = dict[str, Any]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        recipe: of the models.
        seeds: one model each.
        budgets: shares of a text.
        rows: texts of each task.
        kvpress: interpreter of an environment that has it.
        folder: where models are kept.
        workers: processes of one thread each; 0 runs everything in this one.
        only: names of methods, all by default.
    """

    recipe: Recipe = field(default_factory=Recipe)
    seeds: Sequence[int] = (0, 1, 2)
    budgets: Sequence[float] = (0.5, 0.35, 0.2)
    rows: int = 48
    kvpress: Path | None = None
    folder: Path | None = None
    workers: int = 2
    only: Sequence[str] = ()

    def methods(self) -> list[Method]:
        """Return the methods that are measured."""
        return [method for method in methods() if not self.only or method.name in self.only or method.name == FULL]

    def texts(self, task: str, seed: int) -> Batch:
        """Return the texts of a task for a seed's model."""
        return batch(task, HELD_OUT + seed, self.rows, self.recipe.length)

    def groups(self, seed: int) -> list[tuple[Batch, torch.Tensor]]:
        """Return the padded batches for a seed's model."""
        lengths = tuple(int(share * self.recipe.length) for share in SHARES)
        return padded_groups(PADDED_TASK, HELD_OUT + seed, min(GROUPS, max(self.rows // 4, 1)), lengths)


def quality(plan: Plan, tell: Tell = lambda _: None) -> dict[str, Any]:
    """Train the models that are not there yet and measure everything.

    Args:
        plan: see there.
        tell: called with a line from time to time.

    Returns:
        `cells`, `padded` and `versions` of kvpress's environment; see `docs/cache-benchmarks.md`.
    """
    start = time.perf_counter()
    # Models are all trained at a time: on two cores, three one after the other would leave one idle in the end.
    with _executor(plan.workers and max(plan.workers, len(plan.seeds))) as pool:
        for job in [pool.submit(train_one, plan, seed) for seed in plan.seeds]:
            tell(job.result())
    with _executor(plan.workers) as pool:
        tell(f"models are there after {time.perf_counter() - start:.0f} s")
        presses = [pool.submit(run_kvpress, plan, seed) for seed in plan.seeds] if plan.kvpress else []
        own = [pool.submit(run_cells, plan, seed, task, plan.budgets) for seed in plan.seeds for task in TASKS]
        padded = [pool.submit(run_padded, plan, seed) for seed in plan.seeds]
        cells = [cell for job in _told(own, tell, "cells") for cell in job]
        rows = [cell for job in _told(padded, tell, "padded batches") for cell in job]
        versions: dict[str, str] = {}
        for found in _told(presses, tell, "kvpress"):
            cells += found["cells"]
            rows += found["padded"]
            versions = found["versions"]
        if presses:
            limits = equal_bytes(cells)
            jobs = [pool.submit(run_equal, plan, seed, task, limits) for seed in plan.seeds for task in TASKS]
            cells += [cell for job in _told(jobs, tell, "cells of equal bytes") for cell in job]
    return {"cells": cells, "padded": rows, "versions": versions, "seconds": round(time.perf_counter() - start, 1)}


class _Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _executor(workers: int) -> Executor:
    if not workers:
        return _Here()
    context = multiprocessing.get_context("spawn")  # forks of a process with threads hang
    return ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def _told(jobs: Sequence[Future[Any]], tell: Tell, what: str) -> Iterator[Any]:
    for number, job in enumerate(jobs, start=1):
        yield job.result()
        tell(f"{what}: {number} of {len(jobs)}")


def train_one(plan: Plan, seed: int) -> str:
    """Train a model if it is not there; return a line about it."""
    lines: list[str] = []
    _, path = trained(plan.recipe, seed, plan.folder, lines.append)
    return f"model of seed {seed}: {lines[-1] if lines else f'read from {path.name}'}"


def run_cells(plan: Plan, seed: int, task: str, budgets: Sequence[int | float]) -> list[Cell]:
    """Measure all methods on a task of a seed at all budgets."""
    model, _ = trained(plan.recipe, seed, plan.folder)
    texts = plan.texts(task, seed)
    return [
        measured(model, method, budget, texts, aware, task=task, seed=seed)
        for method in plan.methods()
        for budget in (budgets if method.budgeted else (1.0,))
        for aware in ways(texts)
    ]


def run_equal(plan: Plan, seed: int, task: str, limits: dict[Place, float]) -> list[Cell]:
    """Measure the methods that kvpress has, too, with as many tokens as fit into the bytes that it holds."""
    model, _ = trained(plan.recipe, seed, plan.folder)
    texts = plan.texts(task, seed)
    chosen = {method.name: method for method in plan.methods()}
    return [
        {**fitting(model, chosen[place.method], place, texts, limit), "method": f"{place.method}, equal bytes"}
        for place, limit in limits.items()
        if (place.task, place.seed) == (task, seed) and place.method in chosen
    ]


def fitting(model: LlamaForCausalLM, method: Method, place: Place, texts: Batch, limit: float) -> Cell:
    """Return a cell of a method that holds no more bytes than a limit, and hardly less.

    Tokens are taken away one by one, from one layer after the other, the last one first: a text is so short that one
    token in every layer would be several times what is too much.

    Args:
        model: of the place's seed.
        method: of the place.
        place: whose budget is the one to begin with.
        texts: of the place's task.
        limit: bytes a row.
    """
    layers = model.config.num_hidden_layers
    policy = method.policy(model, place.budget, "prefill")
    length = texts.context.shape[1] + (texts.question.shape[1] if place.aware else 0)
    tokens = [tokens_of(policy.layer_budget(layer, layers), [length])[0] for layer in range(layers)]
    later = texts.question.shape[1] + 1 - (texts.question.shape[1] if place.aware else 0)
    removed = 0
    while True:
        cell = measured(model, method, tokens, texts, place.aware, task=place.task, seed=place.seed)
        if "problem" in cell or cell["bytes"] <= limit:
            return {**cell, "budget": place.budget, "tokens": tokens}
        entry = cell["bytes"] / (sum(tokens) + later * layers)
        for _ in range(max(int((cell["bytes"] - limit) / entry), 1)):
            removed += 1
            tokens[-removed % layers] = max(tokens[-removed % layers] - 1, 1)


def measured(
    model: LlamaForCausalLM, method: Method, budget: int | float | list[int], texts: Batch, aware: bool, **more: Any
) -> Cell:
    """Return a cell: how many tokens of the answers are right, and what the cache held; see `Method.cache`."""
    cell = {"method": method.name, "kind": method.kind, "budget": budget, "aware": aware, **more}
    if method.problem:
        return {**cell, "problem": method.problem}
    model.set_attn_implementation(method.implementation)
    length = texts.context.shape[1] + (texts.question.shape[1] if aware else 0)
    try:
        found = read(model, method.cache(model, budget, length, "prefill"), texts, aware)
    except Exception as error:  # shown in the tables, and complained about in the end unless it is refused
        return {**cell, "problem": reason(error)}
    return {**cell, "accuracy": accuracy(found.tokens, texts.answer, aware), **_bytes(model, found.bytes, texts)}


def _bytes(model: LlamaForCausalLM, held: int, texts: Batch) -> dict[str, float]:
    """Return what a row held, and its share of what a full cache holds."""
    rows = len(texts.context)
    full = full_bytes(model, 1, texts.context.shape[1] + texts.question.shape[1] + 1)
    return {"bytes": held / rows, "share": held / rows / full}


def run_padded(plan: Plan, seed: int) -> list[Cell]:
    """Answer about texts of different lengths, each alone and in batches of four with padding."""
    model, _ = trained(plan.recipe, seed, plan.folder)
    found = []
    for method in plan.methods():
        budget = PADDED_BUDGET if method.budgeted else 1.0
        cell = {"method": method.name, "kind": method.kind, "budget": budget, "seed": seed}
        if method.problem:
            found.append({**cell, "problem": method.problem})
            continue
        model.set_attn_implementation(method.implementation)
        alone, together, wanted = [], [], []
        try:
            for texts, mask in plan.groups(seed):
                length = texts.context.shape[1]
                together.append(read(model, method.cache(model, budget, length, "prefill"), texts, False, mask).tokens)
                wanted.append(texts.answer)
                for part in singles(texts, mask):
                    length = part.context.shape[1]
                    alone.append(read(model, method.cache(model, budget, length, "prefill"), part, False).tokens)
        except Exception as error:
            found.append({**cell, "problem": reason(error)})
            continue
        found.append({**cell, **compared(torch.cat(alone), torch.cat(together), torch.cat(wanted))})
    return found


def singles(texts: Batch, mask: torch.Tensor) -> Iterator[Batch]:
    """Yield the rows of a padded batch without their padding."""
    for row in range(len(mask)):
        part = texts.row(row)
        yield Batch(part.context[:, mask[row].bool()], part.question, part.answer)


def compared(alone: torch.Tensor, together: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Return the accuracies of batch 1 and of padded batches, and the share of answers that are the same."""
    return {
        "alone": accuracy(alone, wanted), "padded": accuracy(together, wanted),
        "same": float((alone == together).all(1).float().mean()),
    }  # fmt: skip


def run_kvpress(plan: Plan, seed: int) -> dict[str, Any]:
    """Run kvpress in its environment over the same weights and tokens."""
    model, path = trained(plan.recipe, seed, plan.folder)
    texts = {task: plan.texts(task, seed) for task in TASKS}
    given = {task: _plain(one) for task, one in texts.items()}
    groups = plan.groups(seed)
    for number, (group, mask) in enumerate(groups):
        given[f"padded {number}"] = {**_plain(group), "mask": mask.tolist()}
        given |= {f"alone {number} {row}": _plain(part) for row, part in enumerate(singles(group, mask))}
    cells: list[dict[str, Any]] = []
    names = [name for name in PRESSES if not plan.only or name in plan.only]
    for name in names:
        press, options, eager = PRESSES[name]
        common = {"name": name, "press": press, "options": options, "eager": eager}
        cells += [{**common, "ratio": 1 - budget, "aware": aware, "texts": task}
                  for task in TASKS for budget in plan.budgets for aware in ways(texts[task])]  # fmt: skip
        cells += [
            {**common, "ratio": 1 - PADDED_BUDGET, "aware": False, "texts": key} for key in given if key not in TASKS
        ]
    result = call_kvpress(plan.kvpress, {"model": str(path), "threads": 1, "texts": given, "cells": cells})
    found: list[Cell] = []
    by_name: dict[str, dict[str, Any]] = {name: {} for name in names}
    for cell, outcome in zip(cells, result["results"], strict=True):
        if cell["texts"] not in TASKS:
            by_name[cell["name"]][cell["texts"]] = outcome
            continue
        one = texts[cell["texts"]]
        common = {
            "method": cell["name"], "kind": "kvpress", "budget": round(1 - cell["ratio"], 6), "aware": cell["aware"],
            "task": cell["texts"], "seed": seed,
        }  # fmt: skip
        if "problem" in outcome:
            found.append({**common, "problem": outcome["problem"]})
        else:
            right = accuracy(torch.tensor(outcome["tokens"]), one.answer, cell["aware"])
            found.append({**common, "accuracy": right, **_bytes(model, outcome["bytes"], one)})
    padded = [
        {"method": name, "kind": "kvpress", "budget": PADDED_BUDGET, "seed": seed, **_padded(outcomes, groups)}
        for name, outcomes in by_name.items()
    ]
    return {"cells": found, "padded": padded, "versions": result["versions"]}


def _plain(texts: Batch) -> dict[str, Any]:
    return {"context": texts.context.tolist(), "question": texts.question.tolist(), "answers": texts.answer.shape[1]}


def _padded(outcomes: dict[str, Any], groups: Sequence[tuple[Batch, torch.Tensor]]) -> dict[str, Any]:
    problems = [outcome["problem"] for outcome in outcomes.values() if "problem" in outcome]
    if problems:
        return {"problem": problems[0]}
    tokens = {
        kind: torch.cat([torch.tensor(outcome["tokens"]) for key, outcome in outcomes.items() if key.startswith(kind)])
        for kind in ("alone", "padded")
    }
    return compared(tokens["alone"], tokens["padded"], torch.cat([texts.answer for texts, _ in groups]))


def call_kvpress(python: Path | None, job: dict[str, Any]) -> dict[str, Any]:
    """Run the driver in an environment that has kvpress.

    Args:
        python: the interpreter of that environment.
        job: see `cache_kvpress`.

    Raises:
        RuntimeError: the driver failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "job.json"), Path(folder, "result.json")
        source.write_text(json.dumps(job), encoding="utf-8")
        command = [str(python), cache_kvpress.__file__, str(source), str(target)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {run.stderr.strip().splitlines()[-1:]}")
        found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        return found


class Place(NamedTuple):
    """Where a cell stands in the tables."""

    method: str
    budget: float
    aware: bool
    task: str
    seed: int

    @classmethod
    def of(cls, cell: Cell) -> Place:
        """Return the place of a cell."""
        return cls(*(cell[name] for name in cls._fields))


def equal_bytes(cells: Sequence[Cell]) -> dict[Place, float]:
    """Return the bytes that kvpress's methods hold, for the shared ones that hold more of them here.

    Args:
        cells: of both, at the same nominal budgets.
    """
    ran = [cell for cell in cells if "problem" not in cell]
    theirs = {Place.of(cell): cell["bytes"] for cell in ran if cell["kind"] == "kvpress"}
    ours = {Place.of(cell): cell["bytes"] for cell in ran if cell["kind"] == "hf_ext"}
    return {place: theirs[place] for place, held in ours.items() if theirs.get(place, held) < held}

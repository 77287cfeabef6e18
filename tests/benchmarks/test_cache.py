"""The benchmark of caches: its tasks, its models, and that a tiny run measures what it says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from hf_ext.benchmarks import cache, cache_kvpress, cache_memory, cache_quality, cache_speed, cache_table
from hf_ext.benchmarks.cache_methods import FULL, SLIDING, Method, bytes_of, methods
from hf_ext.benchmarks.cache_models import Recipe, trained
from hf_ext.benchmarks.cache_reading import full_bytes, padded_groups, read
from hf_ext.benchmarks.cache_tasks import (
    ASK,
    BEGIN,
    NOISE,
    OPEN,
    PAD,
    TASKS,
    VALUES,
    VOCABULARY,
    batch,
    example,
    training_batch,
)
from hf_ext.cli.output import CliError

KNORM, STREAMING, MERGER = (Method(name, "hf_ext", name) for name in ("knorm", "streaming-llm", "kvmerger"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def plan(folder: Path) -> cache_quality.Plan:
    return cache_quality.Plan(
        cache.QUICK, seeds=(0,), budgets=(0.5,), rows=4, folder=folder, workers=0, only=("knorm", SLIDING)
    )


def follow(context: list[int], question: list[int], length: int) -> list[int]:
    """Answer by looking up what follows, as often as it takes: the reference all tasks are made for."""
    if question[0] == OPEN:
        start = context.index(OPEN) + 1
        return context[start : start + length]
    found, name = [], question[1]
    first = {token: context.index(token) for token in reversed(context)}
    at = first[name]
    while len(found) < length:
        token = context[at + 1]
        found.append(token)
        # A name leads on to where it is said itself; of what follows a value, the next is beside it.
        at = first[token] if token not in VALUES else at + 1
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [24, 160])
def test_every_question_is_answered_by_the_text(task: str, length: int) -> None:
    for seed in range(5):
        found = example(task, random.Random(seed), length)
        assert len(found.context) == length
        assert found.context[0] == BEGIN
        assert 0.2 < sum(token in NOISE for token in found.context) / length < 0.8
        for question, answer in found.questions:
            context = found.context
            if task == "tracking":  # where a name was defined, not where it was used
                pairs = dict(statements(context))
                told, name = [], question[1]
                while name in pairs:
                    name = pairs[name]
                    told.append(name)
                assert told == answer
            else:
                assert follow(context, question, len(answer)) == answer


def statements(context: list[int]) -> list[tuple[int, int]]:
    """The pairs of a text of chains: what is no noise comes in twos."""
    said = [token for token in context[1:] if token not in NOISE]
    return list(zip(said[::2], said[1::2], strict=True))


def test_only_answers_are_trained_on() -> None:
    ids, labels = training_batch(random.Random(0), 8, 40, 24)
    assert ids.shape == labels.shape == (8, 64)
    assert (labels[:, :40] == -100).all()
    asked = labels != -100
    assert (asked.sum(1) >= 3).all()
    assert torch.equal(labels[asked], ids[asked])
    assert int(ids.max()) < VOCABULARY
    for row in range(0, 8, 4):  # needles: question, name, answer, over and over
        assert (ids[row, 40::3] == ASK).all()


def test_texts_of_evaluation_are_the_same_each_time_and_differ_by_seed() -> None:
    assert torch.equal(batch("copy", 1, 3, 48).context, batch("copy", 1, 3, 48).context)
    assert not torch.equal(batch("copy", 1, 3, 48).context, batch("copy", 2, 3, 48).context)


def test_a_model_is_trained_once_and_learns(folder: Path) -> None:
    recipe = Recipe(layers=1, hidden=32, width=8, steps=60, tokens=288, length=24, shortest=24, lr=1e-2)
    told: list[str] = []
    _, path = trained(recipe, 3, folder, told.append)
    first, last = (float(line.rsplit("loss ", 1)[1].split(",")[0]) for line in (told[0], told[-1]))
    assert last <= first < 5.2
    again = trained(recipe, 3, folder, lambda line: pytest.fail(line))[1]
    assert again == path
    assert recipe.key(3) != recipe.key(4)


def test_a_model_that_copies_is_right_and_its_cache_is_counted() -> None:
    """A stand-in that answers with the token after the last one it was asked about."""
    texts = batch("needle", 0, 3, 32)
    wanted = dict(zip(texts.question[:, 1].tolist(), texts.answer[:, 0].tolist(), strict=True))
    passes: list[tuple[int, ...]] = []

    def model(ids, past_key_values, position_ids, attention_mask, logits_to_keep):
        passes.append((ids.shape[1], int(position_ids[0, 0])))
        past_key_values.update(torch.zeros(3, 2, ids.shape[1], 8), torch.zeros(3, 2, ids.shape[1], 8), 0)
        found = torch.tensor([wanted.get(token, 0) for token in ids[:, -1].tolist()])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(found, VOCABULARY)[:, None].float())

    for aware, steps in ((False, [(32, 0), (1, 32), (1, 33), (1, 34)]), (True, [(34, 0), (1, 34)])):
        passes.clear()
        found = read(model, DynamicCache(), texts, aware)
        assert torch.equal(found.tokens, texts.answer)
        assert passes == steps
        assert found.bytes == 3 * 2 * 35 * 8 * 2 * 4


def test_bytes_are_those_of_every_tensor_of_any_cache(plan: cache_quality.Plan) -> None:
    model, _ = trained(plan.recipe, 0, plan.folder)
    ids = torch.randint(8, 100, (2, 20))
    full = Method(FULL, "transformers", budgeted=False).cache(model, 1.0, 20)
    model(ids, past_key_values=full)
    assert bytes_of(full) == full_bytes(model, 2, 20)
    quantised = next(m for m in methods() if m.name.endswith("fp8"))
    if quantised.problem:
        pytest.skip(quantised.problem)
    codes = quantised.cache(model, 1.0, 20)
    model(ids, past_key_values=codes)
    assert bytes_of(full) / 4 <= bytes_of(codes) < bytes_of(full) / 3


def test_all_policies_are_found_with_what_cannot_be_run() -> None:
    found = {method.name: method for method in methods()}
    assert {FULL, SLIDING, "knorm", "streaming-llm", "kvmerger"} <= set(found)
    assert found["QuantizedCache quanto 4 bits"].problem in ("", "not installed")
    assert not found[FULL].budgeted
    assert "icae" not in found


def test_a_padded_batch_answers_as_its_rows_do_alone(plan: cache_quality.Plan) -> None:
    """For a full cache; the lengths of a group differ and rows are padded on the left."""
    groups = padded_groups("needle", 0, 2, (32, 24, 20, 16))
    for texts, mask in groups:
        assert sorted(mask.sum(1).tolist()) == [16, 20, 24, 32]
        assert (texts.context[mask == 0] == PAD).all()
        assert [part.context[0, 0] for part in cache_quality.singles(texts, mask)] == [BEGIN] * 4
    [row] = [cell for cell in cache_quality.run_padded(plan, 0) if cell["method"] == FULL]
    assert row["same"] == 1.0


def test_cells_hold_fewer_bytes_with_smaller_budgets_and_say_what_is_refused(plan: cache_quality.Plan) -> None:
    model, _ = trained(plan.recipe, 0, plan.folder)
    texts = plan.texts("values", 0)
    for method in (KNORM, STREAMING, MERGER):
        large, small = (cache_quality.measured(model, method, budget, texts, False) for budget in (0.75, 0.25))
        assert 0 <= small["accuracy"] <= 1
        assert small["share"] < 0.6 < large["share"]
    refused = cache_quality.measured(model, KNORM, 3.0, texts, False)
    assert "a budget as a share must be above 0.0" in refused["problem"]


def test_a_method_that_breaks_is_shown_and_complained_about(
    plan: cache_quality.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = trained(plan.recipe, 0, plan.folder)

    def broken(*_: object) -> None:
        raise RuntimeError("no such column\nat all")

    monkeypatch.setattr(Method, "cache", broken)
    cell = cache_quality.measured(model, KNORM, 0.5, plan.texts("needle", 0), False)
    assert cell["problem"] == "failed: RuntimeError: no such column"
    refused = {"method": "h2o", "problem": "ValueError: no"}
    assert cache.broken({"quality": {"cells": [cell, cell, refused]}}) == [f"knorm: {cell['problem']}"]


def test_equal_bytes_are_as_many_tokens_as_fit(plan: cache_quality.Plan) -> None:
    """Those of the same task and seed, to a token in a layer."""
    model, _ = cache_quality.trained(plan.recipe, 0, plan.folder)
    where = {"method": "knorm", "budget": 0.5, "aware": True, "task": "values", "seed": 0}
    texts = plan.texts("values", 0)
    ours = cache_quality.measured(model, KNORM, 0.5, texts, True, task="values", seed=0)
    for spare in (0, 1, 2.5):
        limit = ours["bytes"] - spare * ours["bytes"] / 100
        other = [{**where, "kind": "kvpress", "bytes": limit}, {**where, "kind": "kvpress", "bytes": 1, "task": "copy"}]
        limits = cache_quality.equal_bytes([ours, *other])
        assert list(limits.values()) == [limit] * bool(spare)
        for found in cache_quality.run_equal(plan, 0, "values", limits):
            layers = model.config.num_hidden_layers
            entry = found["bytes"] / (sum(found["tokens"]) + layers)
            assert limit - 1.1 * entry < found["bytes"] <= limit, (found["bytes"], limit)
            assert max(found["tokens"]) - min(found["tokens"]) <= 1
            assert found["method"] == "knorm, equal bytes"
    assert cache_quality.equal_bytes([ours, {**where, "kind": "kvpress", "bytes": 1.0, "problem": "no"}]) == {}


def test_kvpress_is_asked_for_the_same_tokens_and_its_answers_are_judged_here(
    plan: cache_quality.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = plan.texts("copy", 0)

    def answer(_: object, job: dict) -> dict:
        assert (Path(job["model"]) / "config.json").is_file()
        results = []
        for cell in job["cells"]:
            given = job["texts"][cell["texts"]]
            if cell["texts"] == "copy":
                assert given["context"] == texts.context.tolist()
                results.append({"tokens": texts.answer.tolist(), "bytes": 4000})
            elif cell["texts"] == "needle":
                results.append({"problem": "AssertionError: no"})
            else:
                results.append({"tokens": [[0] * given["answers"]] * len(given["context"]), "bytes": 4000})
        return {"results": results, "versions": {"kvpress": "0"}}

    monkeypatch.setattr(cache_quality, "call_kvpress", answer)
    found = cache_quality.run_kvpress(plan, 0)
    by_task = {cell["task"]: cell for cell in found["cells"]}
    assert by_task["copy"]["accuracy"] == 1.0
    assert by_task["copy"]["bytes"] == 1000
    assert by_task["needle"]["problem"] == "AssertionError: no"
    assert by_task["values"]["accuracy"] == 0.0
    assert [(row["method"], row["same"]) for row in found["padded"]] == [("knorm", 1.0)]


def test_the_driver_of_kvpress_needs_nothing_of_this_package() -> None:
    source = Path(cache_kvpress.__file__).read_text(encoding="utf-8")
    assert "hf_ext" not in source.split('"""', 2)[2]
    assert not hasattr(cache_kvpress, "main")  # it is no benchmark of its own


def test_presses_are_built_with_their_ratio() -> None:
    class Press:
        def __init__(self, window_size: int = 1, press: object = None) -> None:
            self.window_size, self.press, self.compression_ratio = window_size, press, 0.0

    options = {"press": ["Inner", {"window_size": 8}]}
    found = cache_kvpress.build(SimpleNamespace(Outer=Press, Inner=Press), "Outer", options, 0.25)
    assert (found.compression_ratio, found.press.window_size, found.press.compression_ratio) == (0.25, 8, 0.25)
    assert options == {"press": ["Inner", {"window_size": 8}]}


def cells(method: str, kind: str, accuracies: tuple[float, ...], share: float, budget: float = 0.5) -> list[dict]:
    common = {
        "method": method,
        "kind": kind,
        "task": "copy",
        "aware": False,
        "budget": budget,
        "share": share,
        "bytes": 1.0,
    }
    return [{**common, "seed": seed, "accuracy": value} for seed, value in enumerate(accuracies)]


def test_tables_show_losses_as_well_as_wins() -> None:
    found = [
        *cells("knorm", "hf_ext", (0.5, 0.7), 0.51), *cells("knorm, equal bytes", "hf_ext", (0.4, 0.6), 0.49),
        *cells("knorm", "kvpress", (0.6, 0.6), 0.5), *cells(FULL, "transformers", (1.0, 1.0), 1.0, budget=1.0),
    ]  # fmt: skip
    _, rows = cache_table.shared_rows(found)
    assert rows == [["knorm", "unaware", "60.0", "60.0", "50.0", "-10.0", "1 of 1"]]
    _, rows = cache_table.quality_rows(found, "copy", False)
    assert [row[0] for row in rows] == [FULL, "knorm (hf_ext)", "knorm (kvpress)", "knorm, equal bytes (hf_ext)"]
    assert rows[1][1] == "60 [50, 70] at 0.510"
    columns, rows = cache_table.best_rows(found)
    assert dict(zip(columns, rows[0], strict=True))["kvpress"] == "knorm 60"


@torch.no_grad()
def test_times_are_ratios_to_the_full_cache_in_the_same_round() -> None:
    rows = cache_speed.speed(cache_speed.model_of(1, 32, 8), 48, 2, 2, ("knorm",))
    by_name = {row["method"]: row for row in rows}
    for name in (FULL, "knorm"):  # the full cache beside itself tells how far two runs are apart
        for what in ("prefill", "decode"):
            low, high = by_name[name][f"{what}_spread"]
            assert 0 < low <= by_name[name][f"{what}_ratio"] <= high


def test_what_is_held_is_measured_beside_the_budget() -> None:
    by_name = {row["method"]: row for row in cache_memory.resident(64, 2, (0.5,), (1, 32))}
    assert by_name[FULL]["after_prefill"] == 1.0
    assert 1.0 < by_name["knorm"]["after_prefill"] < 1.05
    assert by_name[SLIDING]["after_decoding"] > 0
    assert not any(row.get("problem", "").startswith("ValueError: quantised") for row in by_name.values())


def test_peaks_are_those_of_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(command: list[str], **_: object) -> SimpleNamespace:
        assert command[1:3] == ["-m", "hf_ext.benchmarks.cache_memory"]
        return SimpleNamespace(returncode=0, stdout=json.dumps(cache_memory.point(**json.loads(command[3]))))

    monkeypatch.setattr(cache_memory.subprocess, "run", here)
    rows = cache_memory.curves((96,), 32, 16, 1, (1, 32), only=("knorm",))
    assert [(row["method"], row["chunk"]) for row in rows] == [(FULL, 0), (FULL, 32), ("knorm", 32)]
    whole = 96 * 2 * 64 * 2 * 4 / 2**20
    assert rows[0]["held_mib"] == rows[1]["held_mib"] == pytest.approx(whole)
    assert rows[2]["held_mib"] < whole / 4
    assert rows[0]["rss_mib"] is None or rows[0]["rss_mib"] >= 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "1"], "--rounds 2"),
        (["--budgets", "1.5"], "shares of a text"),
        (["--kvpress", "nowhere/python"], "there is no interpreter nowhere"),
    ],
)
def test_what_cannot_be_honoured_is_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(CliError, match=words):
        cache.main(arguments)


def test_a_quick_run_writes_a_record_that_renders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "record.json"
    common = ["--quick", "--threads", "1", "--models", str(folder), "--json", str(out)]
    cache.main([*common, "--quality", "--speed", "--methods", "knorm", "--budgets", "0.5"])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {cell["task"] for cell in record["quality"]["cells"]} == set(TASKS)
    assert {cell["task"] for cell in record["quality"]["cells"] if cell["aware"]} == set(TASKS) - {"needle"}
    assert str(folder) not in record["command"]
    names = cache_table.plot(record, tmp_path)
    assert names == ["cache_unaware.png", "cache_aware.png"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
    page = cache_table.markdown(record, names)
    assert "knorm (hf_ext)" in page
    assert "Accuracy: copy, aware" in capsys.readouterr().out

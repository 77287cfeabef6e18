"""The speculative benchmark counts what runs, shows no speed of a wrong text, and leaves no method out silently."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from hf_ext.benchmarks import speculative, speculative_figures, speculative_measure, speculative_methods
from hf_ext.benchmarks import speculative_runs as runs
from hf_ext.benchmarks import speculative_table as table
from hf_ext.benchmarks.speculative_measure import Passes
from hf_ext.benchmarks.speculative_methods import BASELINES, PLAIN, Method
from hf_ext.benchmarks.speculative_settings import Prompt, Setting, choose_prompts, endless
from hf_ext.cli.output import CliError
from hf_ext.testing import tiny_models
from hf_ext.testing.tiny_models import calls_of

ASSISTED, LOOKUP = BASELINES
TOKENS = 13


@pytest.fixture(scope="module")
def setting() -> Setting:
    """Return two tiny models, one of which drafts for itself."""
    target, twin, other = (endless(tiny_models.build("llama")) for _ in range(3))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    ids = tiny_models.prompts((12, 7))[0]
    prompts = [Prompt("long", ids[:1], False), Prompt("short", ids[1:, -7:], True)]
    return Setting("tiny", target, {"twin": twin, "other": other}, tiny_models.tokenizer(), prompts)


def measured(setting: Setting, *methods: Method, temperature: float = 0.0, rounds: int = 1) -> list[runs.Row]:
    rows = runs.rows_of(setting, methods)
    runs.measure(setting, rows, temperature, TOKENS, 3, rounds, lambda what: None)
    return rows


def section(setting: Setting, rows: list[runs.Row], temperature: float = 0.0) -> dict:
    curves = {name: {1: 1.0, 64: 1.0} for name in (None, *setting.drafts)}
    return speculative._section(setting, rows, temperature, TOKENS, curves)


def altered(setting: Setting, draft: object, draft_tokens: int) -> speculative_methods.Call:
    """Decode plainly, then change the last token."""

    def run(**inputs) -> tuple[torch.Tensor, None]:
        out = setting.target.generate(**inputs)
        out[:, -1] = (out[:, -1] + 1) % tiny_models.VOCABULARY
        return out, None

    return run


ALTERED = Method("altered", baseline=altered)


def test_passes_agree_with_a_hook_on_the_model_as_a_whole(setting: Setting) -> None:
    inputs = runs.inputs_of(setting.prompts[0])
    with Passes(setting.target) as passes:
        _, calls = calls_of(setting.target, lambda: setting.target.generate(**inputs, max_new_tokens=6))
    assert passes.calls == len(calls) == 6
    assert passes.positions == sum(rows * width for rows, width in calls)
    assert passes.partial_calls == passes.partial_work == 0
    assert not any(layer._forward_pre_hooks for layer in setting.target.model.layers)


def test_a_pass_through_some_layers_is_drafting_and_no_call_of_the_target(setting: Setting) -> None:
    model, ids = setting.target, setting.prompts[0].ids
    with torch.no_grad(), Passes(model) as passes:
        model(ids)
        states = model.model.embed_tokens(ids[:, :2])
        angles = model.model.rotary_emb(states, torch.arange(2)[None])
        model.model.layers[0](states, position_embeddings=angles)
    assert (passes.calls, passes.positions) == (1, ids.shape[1])
    assert (passes.partial_calls, passes.partial_work) == (1, 0.5)


def test_a_draft_that_is_the_target_is_accepted_whole_and_an_unrelated_one_hardly(setting: Setting) -> None:
    rows = measured(setting, ASSISTED)
    plain, twin, other = (speculative_figures.counts(row.samples, TOKENS) for row in rows)
    assert plain["tokens_per_call"] == plain["positions_per_token"] == 1.0
    assert plain["draft_calls_per_token"] == 0
    assert twin["tokens_per_call"] == TOKENS / 4  # 3 drafted and 1 more, each of 3 times, then the last
    assert twin["draft_calls_per_call"] >= 2
    assert other["tokens_per_call"] < 1.5, other
    assert other["positions_per_call"] > 2.5, other
    assert [row.status for row in rows] == ["ok"] * 3


def test_a_method_with_another_text_is_marked_and_shows_no_speed(setting: Setting) -> None:
    rows = measured(setting, ALTERED, LOOKUP)
    assert [row.status for row in rows] == ["ok", "differs", "ok"]
    found = section(setting, rows)
    assert "speed" not in found["rows"][1]
    assert "speed" in found["rows"][2]
    cells = table.rows(found)[1]
    assert "DIFFERS" in cells
    assert not any(character.isdigit() for cell in cells for character in cell), cells


def test_a_method_of_another_law_is_not_compared_but_marked(setting: Setting) -> None:
    [_, row] = measured(setting, Method("altered", baseline=ALTERED.baseline, exact=False))
    assert row.status == "ok"
    found = section(setting, [measured(setting)[0], row])
    assert "another law" in table.rows(found)[1][-1]


def test_a_method_that_fails_is_reported_and_the_others_still_run(setting: Setting) -> None:
    def broken(**inputs) -> None:
        raise ValueError("no drafts today")

    rows = measured(setting, Method("broken", baseline=lambda *_: broken), LOOKUP)
    assert [row.status.partition(":")[0] for row in rows] == ["ok", "failed", "ok"]
    target = {"name": "tiny", "sections": [section(setting, rows)], "batches": []}
    with pytest.raises(CliError, match=r"broken on the tiny target: failed: .*no drafts today"):
        speculative._complain({"targets": [target]})


def test_a_method_that_never_calls_the_target_fails(setting: Setting) -> None:
    text = setting.target.generate(**runs.inputs_of(setting.prompts[0]), max_new_tokens=TOKENS, do_sample=False)
    [_, row] = measured(setting, Method("oracle", baseline=lambda *_: lambda **inputs: (text, None)))
    assert "never called the target" in row.status


def test_methods_that_are_not_installed_or_not_for_a_target_are_listed(setting: Setting) -> None:
    other = Method("contrastive-search", targets=("embedded",))
    rows = measured(setting, Method("no-such-method"), other)
    assert [row.status for row in rows] == ["ok", "not installed", "not for this target"]
    remarks = table.remarks(section(setting, rows), "rows")
    assert remarks == ["not installed: no-such-method", "not for this target: contrastive-search"]


def test_our_methods_get_the_draft_and_its_length_and_report_their_steps(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_ext.generation.speculative_decoding import SpeculativeDecoding

    monkeypatch.setattr(Method, "strategy_class", lambda self: SpeculativeDecoding)
    rows = measured(setting, Method("speculative-decoding"))
    assert [(row.draft, row.status) for row in rows] == [(None, "ok"), ("twin", "ok"), ("other", "ok")]
    found = section(setting, rows)["rows"]
    assert found[1]["tokens_per_call"] > 2.5 > found[2]["tokens_per_call"]
    assert set(found[1]["ms_per_step"]) == {"draft", "verify", "bookkeeping"}
    assert all(value > 0 for value in found[1]["ms_per_step"].values())
    for row in rows[1:]:  # what hooks count is what the engine says
        for sample in row.samples:
            assert sample.calls == sample.report["target_calls"]
            assert sample.draft_calls == sample.report["draft_calls"]


def test_an_installed_plugin_without_a_draft_runs_with_its_options(setting: Setting) -> None:
    [_, row] = measured(setting, Method("contrastive-search", options={"top_k": 1}))
    assert (row.status, row.draft) == ("ok", None)
    assert row.samples[0].report["strategy"] == "ContrastiveSearch"


def test_sampling_checks_the_length_only(setting: Setting) -> None:
    def short(**inputs) -> tuple[torch.Tensor, None]:
        return setting.target.generate(**inputs)[:, :-1], None

    rows = measured(setting, ASSISTED, Method("short", baseline=lambda *_: short), temperature=0.7)
    assert [row.status.partition(":")[0] for row in rows] == ["ok", "ok", "ok", "failed"]
    assert "expected (1, " in rows[3].status


def test_batches_give_tokens_a_second_and_are_compared_with_a_plain_batch(setting: Setting) -> None:
    rows = [runs.Row(PLAIN), runs.Row(Method("contrastive-search", options={"top_k": 1}))]
    found = runs.batches(setting, rows, (1, 3), TOKENS, 3, 1, lambda what: None)
    assert [(entry["batch"], entry["status"]) for entry in found] == [(1, "ok"), (1, "ok"), (3, "ok"), (3, "ok")]
    assert all(entry["tokens_per_second"] > 0 for entry in found)
    columns, cells = table.batch_rows(found)
    assert columns == ["method", "draft", "batch 1", "batch 3"]
    assert len(cells) == 2


def sample(seconds: float, prompt: int, round_: int, **counts) -> runs.Sample:
    given = {"calls": 4, "positions": 12, "draft_calls": 8, "partial_work": 0.0, "report": None, **counts}
    return runs.Sample(prompt, round_, seconds, **given)


def test_speed_prediction_and_reason_follow_from_the_runs() -> None:
    plain, row = runs.Row(PLAIN), runs.Row(ASSISTED, draft="target")
    plain.samples = [sample(8.0, prompt, number, calls=8, positions=8) for prompt in (0, 1) for number in (1, 2)]
    row.samples = [sample(16.0, 0, 1), sample(16.0, 0, 2), sample(10.0, 1, 1), sample(10.0, 1, 2)]
    curves = {None: {1: 10.0, 5: 20.0}, "target": {1: 4.0, 5: 4.0}}
    found = speculative_figures.figures(row, plain, 8, curves, {0, 1}, weights=100.0)
    assert found["speed"] == pytest.approx((0.5 + 0.8) / 2)
    assert found["tokens_per_call"] == 2.0
    assert found["ms_per_token"] == pytest.approx(1e3 * 13 / 7)
    # Three positions cost 1.5 plain calls, two draft calls 0.8 of one.
    assert found["predicted_speed"] == pytest.approx(2.0 / 2.3)
    step = found["step"]
    assert step["cost"] == pytest.approx(2.0 / 0.65)
    assert step["verify"] + step["draft"] + step["rest"] == pytest.approx(step["cost"])
    assert "verifying 49 %" in found["why"]
    other = runs.Row(ASSISTED, draft="target")
    other.samples = [sample(24.0, 0, 1), sample(24.0, 0, 2), sample(15.0, 1, 1), sample(25.0, 1, 2)]
    beside = speculative_figures.figures(row, plain, 8, curves, {0, 1}, weights=100.0, assisted=other)
    assert beside["over_assisted"] == pytest.approx((1.5 + 2.0) / 2)
    assert "over_assisted" not in speculative_figures.figures(row, plain, 8, curves, {0, 1}, 100.0, assisted=row)
    only_second = speculative_figures.figures(row, plain, 8, curves, {1}, weights=100.0)
    assert only_second["speed"] == pytest.approx(0.8)


def test_the_first_pass_is_timed_and_no_other(setting: Setting) -> None:
    pauses = iter([0.05, 0.2])
    hook = setting.target.model.layers[0].self_attn.register_forward_hook(lambda *_: time.sleep(next(pauses)))
    with speculative_measure.Passes(setting.target) as passes:
        setting.target(torch.tensor([[3, 4, 5]]))
        setting.target(torch.tensor([[6]]))
    hook.remove()
    assert 0.05 <= passes.first_seconds < 0.2, f"{passes.first_seconds:.3f} seconds"


def test_widths_are_measured_with_the_same_context_for_each(setting: Setting) -> None:
    (found, calls) = calls_of(setting.target, lambda: speculative_measure.widths(setting.target, (1, 4), 16, repeats=2))
    assert [width for _, width in calls] == [16, 1, 4, 1, 4, 1, 4]
    assert set(found) == {1, 4}
    assert all(ms > 0 for ms in found.values())


def test_peak_memory_is_what_a_call_holds_at_its_height() -> None:
    size = 64 * 2**20 // 4
    found = speculative_measure.peak_memory(lambda: torch.zeros(size).add_(1).sum())
    assert found == pytest.approx(64, abs=6), f"{found:.1f} MiB, 64 were expected"
    again = speculative_measure.peak_memory(lambda: None)
    assert again < 6, f"{again:.1f} MiB, none were expected"


def test_a_quarter_of_the_prompts_are_tables() -> None:
    from transformers import AutoTokenizer

    from hf_ext import demo

    prompts = choose_prompts(4, AutoTokenizer.from_pretrained(demo.path("target")))
    assert [prompt.table for prompt in prompts] == [False, False, False, True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "plainly"], "no method 'plainly'; there are baselines, transformers assisted"),
        (["--tokens", "1"], "--tokens must be 2 at least"),
        (["--temperature", "-1"], "--temperature must be 0 or more"),
    ],
)
def test_what_cannot_be_honoured_is_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(CliError, match=words) as found:
        speculative.main(arguments)
    assert "\n" not in str(found.value)


def test_the_quick_run_prints_tables_and_writes_a_record_that_renders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MKL_CBWR", "AUTO")
    threads = torch.get_num_threads()
    out = tmp_path / "record.json"
    speculative.main(["--quick", "--methods", "transformers lookup", "--threads", "1", "--json", str(out)])
    assert torch.get_num_threads() == threads
    assert "embedded target, greedy, 2 prompts: speed" in capsys.readouterr().out
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["hardware"]["threads"] == 1
    assert {"torch", "transformers", "hf_ext", "python"} <= record["versions"].keys()
    [target] = record["targets"]
    [greedy] = target["sections"]
    assert [row["method"] for row in greedy["rows"]] == ["plain generate", "transformers lookup"]
    assert all(row["status"] == "ok" and row["speed"] > 0 for row in greedy["rows"])
    page = table.markdown(record)
    assert record["command"] in page
    assert "| transformers lookup | - |" in page


def test_every_method_of_the_table_has_a_name_of_its_own() -> None:
    names = [method.name for method in speculative_methods.METHODS]
    assert len(set(names)) == len(names) >= 19
    assert speculative_methods.select("baselines,spectr,spectr") == [*BASELINES, Method("spectr")]

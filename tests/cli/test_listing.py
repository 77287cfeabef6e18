"""`hf-ext list` and `hf-ext show`."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from hf_ext import plugins


def test_list_prints_every_plugin(cli: Any) -> None:
    run = cli("list")
    assert run.status == 0
    for plugin in plugins.all():
        assert plugin.name in run.out


def test_list_as_json_holds_what_the_plugins_are(cli: Any) -> None:
    listed = json.loads(cli("list", "--json").out)
    assert [item["name"] for item in listed] == [plugin.name for plugin in plugins.all()]
    assert listed[0].keys() == {
        "name", "kind", "summary", "target", "paper", "covers", "auto", "example", "claims"
    }  # fmt: skip


def test_list_keeps_one_kind(cli: Any) -> None:
    kinds = {item["kind"] for item in json.loads(cli("list", "--kind", "strategy", "--json").out)}
    assert kinds == {"strategy"}
    run = cli("list", "--kind", "strateg")
    assert run.status == 1
    assert run.err.startswith("error: no plugin of kind 'strateg'; there are ")


def test_list_names_a_broken_plugin_in_one_line(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = plugins._discover()
    bad = plugins.BrokenPlugin("worn", "some-package", "RuntimeError: it broke\nin two lines")
    monkeypatch.setattr(plugins, "_discover", lambda: (found, (bad,)))
    run = cli("list", "--json")
    assert (
        run.err == "warning: plugin 'worn' of package 'some-package' is broken: RuntimeError: it broke in two lines\n"
    )
    assert len(json.loads(run.out)) == len(found)


def test_list_and_every_help_text_import_neither_torch_nor_transformers() -> None:
    code = """
        import sys
        from hf_ext.cli import app, main
        commands = [command.name for command in app.registered_commands]
        assert len(commands) == 9, commands
        for arguments in [["list"], ["list", "--json"], ["--help"], *([name, "--help"] for name in commands)]:
            assert main(arguments) == 0, arguments
        heavy = {"torch", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)
        assert not heavy, heavy
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", [plugin.name for plugin in plugins.all()])
def test_show_prints_paper_example_and_every_option(cli: Any, name: str) -> None:
    from hf_ext.cli.listing import describe

    plugin = plugins.get(name)
    run = cli("show", name)
    assert run.status == 0
    text = "".join(run.out.split())
    assert "".join(plugin.paper.split()) in text
    assert "".join(plugin.example.split()) in text
    options = describe(plugin)["options"]
    assert options
    if plugin.kind != "model":  # a configuration shares most names with every other one
        assert [o["name"] for o in options if not o["help"]] == [], "options without a line in the docstring's Args"


def test_show_as_json_gives_types_and_defaults(cli: Any) -> None:
    shown = json.loads(cli("show", "contrastive-search", "--json").out)
    options = {option["name"]: (option["type"], option["default"]) for option in shown["options"]}
    assert options == {"penalty_alpha": ("float", "0.6"), "top_k": ("int", "4")}
    assert shown["paper"].endswith("(arXiv:2210.14140)")


def test_show_gives_the_figures_of_the_record(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    record = {
        "date": "2026-01-02",
        "hardware": {"cpu": "A CPU"},
        "versions": {"torch": "2.13.0"},
        "claims": [
            {
                "paper": "Says little twice.", "measures": "rep-4", "unit": "%", "threshold": "<= 5", "error": "",
                "status": "reproduced", "measurement": {"value": 3.25},
            }
        ],
    }  # fmt: skip
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "contrastive-search.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr("hf_ext.cli.listing._cards", lambda: tmp_path)
    run = cli("show", "contrastive-search")
    for part in ("Says little twice.", "3.25 %", "<= 5", "reproduced", "A CPU", "torch 2.13.0"):
        assert part in run.out
    (tmp_path / "results" / "contrastive-search.json").unlink()
    assert "none on record; `hf-ext verify contrastive-search` measures them" in cli("show", "contrastive-search").out


def test_unknown_plugin_is_one_line_with_the_nearest_names(cli: Any) -> None:
    run = cli("show", "contrastive-serach")
    assert (run.status, run.out) == (1, "")
    assert run.err == "error: unknown plugin 'contrastive-serach'; nearest: contrastive-search\n" or (
        run.err.startswith("error: unknown plugin 'contrastive-serach'; nearest: contrastive-search,")
        and run.err.count("\n") == 1
    )


def test_bench_lists_what_can_be_called_by_name() -> None:
    from hf_ext.cli.bench import benchmarks

    found = benchmarks()
    assert {"speculative", "attention", "cache", "objectives", "import_time"} <= found.keys()
    assert not {"objectives_measure", "kvpress_indices"} & found.keys(), "scripts that benchmarks start"
    assert all(found.values())

"""`hf-ext verify`, `bench`, `demo`, `export` and `push`: what they hand on and what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from hf_ext import plugins, verify
from hf_ext.plugins import Plugin
from hf_ext.testing.local_hub import LocalHub
from hf_ext.verify import Claim, Measurement, Threshold


def claim(name: str, value: float) -> Claim:
    return Claim(name, f"Paper says {name}.", "a number", Threshold("<=", 1), lambda: Measurement(value), unit="nats")


def fails() -> Measurement:
    raise RuntimeError("no such data")


HELD = claim("held", 0.5)
TESTED = {
    "good": (HELD,),
    "bad": (HELD, claim("missed", 2.0)),
    "ill": (Claim("ill", "Paper says ill.", "a number", None, fails),),
}


@pytest.fixture
def claimants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins `good`, `bad` and `ill`, with claims that hold, do not hold, and cannot be checked."""
    found = {name: Plugin(name, "tool", "", "json:loads", claims=f"{name}_claims:CLAIMS") for name in TESTED}
    real = plugins.resolve

    def resolve(target: str, name: str) -> Any:
        return TESTED[name] if target.endswith("_claims:CLAIMS") else real(target, name)

    monkeypatch.setattr(plugins, "resolve", resolve)
    monkeypatch.setattr(plugins, "get", lambda name: found[name])
    monkeypatch.setattr(plugins, "all", lambda kind=None: list(found.values()))


@pytest.mark.usefixtures("claimants")
def test_verify_prints_claim_against_measurement(cli: Any) -> None:
    run = cli("verify", "good")
    assert run.status == 0
    for part in ("Paper says held.", "0.5 nats", "<= 1", "reproduced"):
        assert part in run.out
    result = json.loads(cli("verify", "good", "--json").out)
    assert [(r["claim"], r["status"], r["measurement"]["value"]) for r in result] == [("held", "reproduced", 0.5)]


@pytest.mark.usefixtures("claimants")
@pytest.mark.parametrize(("name", "words"), [("bad", "not reproduced"), ("ill", "RuntimeError: no such data")])
def test_verify_ends_with_status_1_when_a_claim_does_not_hold(cli: Any, name: str, words: str) -> None:
    run = cli("verify", name)
    assert run.status == 1
    assert words in " ".join(run.out.split())
    assert "Traceback" not in run.err


@pytest.mark.usefixtures("claimants")
def test_verify_without_names_checks_all_plugins(cli: Any) -> None:
    run = cli("verify", "--json")
    assert run.status == 1
    assert {result["plugin"] for result in json.loads(run.out)} == set(TESTED)


@pytest.mark.usefixtures("claimants")
def test_verify_writes_cards_only_when_asked(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[list[str]] = []

    def write(results: Any) -> list[Path]:
        written.append([result.claim.name for result in results])
        return [Path("good.md")] if results else []

    monkeypatch.setattr(verify, "write", write)
    cli("verify", "good")
    assert written == []
    assert "wrote good.md" in cli("verify", "good", "--write").err
    assert written == [[], ["held"]]  # an empty call first: is there a place to write to?


def test_verify_names_an_unknown_plugin_before_measuring(cli: Any) -> None:
    run = cli("verify", "maep")
    assert (run.status, run.out) == (1, "")
    assert run.err.startswith("error: unknown plugin 'maep'; nearest: meap")


def test_bench_lists_and_runs_the_benchmarks(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_ext.benchmarks import import_time

    seen: list[list[str]] = []
    monkeypatch.setattr(import_time, "main", seen.append)
    assert "import_time" in cli("bench").out
    assert cli("bench", "import_time", "--runs", 3).status == 0
    assert seen == [["--runs", "3"]]
    assert "passed on to it, also --help" in cli("bench", "--help").out
    cli("bench", "import_time", "--help")
    assert seen[1:] == [["--help"]]
    run = cli("bench", "import_tim")
    assert run.status == 1
    assert run.err.startswith("error: no benchmark 'import_tim'; there are ")


def test_a_benchmark_that_stops_gives_its_status(cli: Any) -> None:
    run = cli("bench", "import_time", "--runs", "many")
    assert run.status == 2
    assert run.err.endswith("import_time: error: argument --runs: invalid int value: 'many'\n")


def test_demo_prints_its_figures_as_json(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hf_ext import demo

    calls: list[dict[str, Any]] = []

    def run(**options: Any) -> dict[str, Any]:
        calls.append(options)
        return {"seconds": 1.5}

    monkeypatch.setattr(demo, "run", run)
    assert json.loads(cli("demo", "--json").out) == {"seconds": 1.5}
    assert cli("demo", "--report", tmp_path).out == ""
    assert calls == [{"report": None, "json": True}, {"report": tmp_path, "json": False}]


def test_export_writes_a_repository_and_lists_its_files(cli: Any, tmp_path: Path) -> None:
    run = cli("export", "contrastive-search", tmp_path / "out", "--no-check", "--json")
    assert (run.status, run.err) == (0, "")
    result = json.loads(run.out)
    assert "custom_generate/generate.py" in result["files"]
    assert (tmp_path / "out" / "custom_generate" / "generate.py").is_file()
    again = cli("export", "contrastive-search", tmp_path / "out", "--no-check")
    assert again.status == 1
    assert again.err.startswith("error: ")
    assert again.err.count("\n") == 1
    assert cli("export", "contrastive-search", tmp_path / "out", "--no-check", "--overwrite").status == 0


def test_export_of_an_objective_says_what_to_do_instead(cli: Any, tmp_path: Path) -> None:
    run = cli("export", "meap", tmp_path / "out")
    assert run.status == 1
    assert run.err.startswith("error: cannot export meap, a plugin of the kind objective")
    assert not (tmp_path / "out").exists()


def test_push_uploads_through_the_real_client_and_says_what_a_refusal_means() -> None:
    program = """
        import os
        from hf_ext.cli import main
        command = ["push", "contrastive-search", "user/ours", "--no-check"]
        assert main(command) == 0
        os.environ["HF_TOKEN"] = "hf_wrong"
        assert main([*command, "--json"]) == 1
    """
    with LocalHub() as hub:
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env={**os.environ, **hub.environment()}, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert "custom_generate/generate.py" in hub.files("user/ours")
    [url] = run.stdout.splitlines()
    assert url.startswith(f"{hub.endpoint}/user/ours/commit/")
    [refusal] = run.stderr.splitlines()
    assert refusal.startswith("error: ")
    assert "token" in refusal

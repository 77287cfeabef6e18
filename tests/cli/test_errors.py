"""Errors are one line on the standard error stream, unless a traceback is asked for."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

import hf_ext
from hf_ext.cli import output
from hf_ext.cli.output import LONGEST, CliError, one_line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lsit"], "error: No such command 'lsit'."),
        (["show"], "error: Missing argument 'name'."),
        (["list", "--colour"], "error: No such option: --colour"),
        (["generate", "--max-new-tokens", "0", "x"], "error: Invalid value for '--max-new-tokens'"),
        (["generate", "--seed", "-1", "x"], "error: Invalid value for '--seed'"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(cli: Any, arguments: list[str], message: str) -> None:
    run = cli(*arguments)
    assert (run.status, run.out) == (2, "")
    assert run.err.startswith(message), run.err
    assert run.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_no_arguments_and_either_spelling_of_help_print_the_help(cli: Any, arguments: list[str]) -> None:
    run = cli(*arguments)
    assert run.status == 0
    assert "Commands" in run.out


def test_version(cli: Any) -> None:
    assert cli("--version").out == f"hf-ext {hf_ext.__version__}\n"


@pytest.mark.parametrize("arguments", [["--debug", "show", "nothing-like-it"], ["show", "nothing-like-it", "--debug"]])
def test_debug_raises(cli: Any, arguments: list[str]) -> None:
    with pytest.raises(hf_ext.plugins.PluginError):
        cli(*arguments)


def test_debug_by_environment_raises(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_EXT_DEBUG", "1")
    with pytest.raises(hf_ext.plugins.PluginError):
        cli("show", "nothing-like-it")
    monkeypatch.setenv("HF_EXT_DEBUG", "0")
    assert cli("show", "nothing-like-it").status == 1


def test_debug_after_two_dashes_is_an_argument(cli: Any) -> None:
    run = cli("show", "--", "--debug")
    assert run.err.startswith("error: unknown plugin '--debug'")


def test_an_interrupt_is_no_traceback(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_ext.plugins.all", interrupt)
    run = cli("list")
    assert run.status == 130
    assert "Traceback" not in run.err


def test_foreign_errors_carry_their_type_and_long_ones_are_cut() -> None:
    assert one_line(CliError("a\n  b")) == "a b"
    assert one_line(ZeroDivisionError("division by zero")).startswith("ZeroDivisionError: division by zero (--debug")
    assert len(one_line(CliError("x" * 5000))) <= LONGEST


def test_a_terminal_that_knows_no_accents_gets_all_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", out := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    output.print_json({"text": "\u00e9"})  # JSON has its own way to write them
    assert hf_ext.cli.main(["list", "--kind", "model"]) == 0
    out.flush()
    text = out.buffer.getvalue().decode("ascii")
    assert json.loads(text.partition("}")[0] + "}") == {"text": "\u00e9"}
    assert "swan-gpt" in text
    print("\u00e9", end="")
    out.flush()
    assert out.buffer.getvalue().endswith(b"?")

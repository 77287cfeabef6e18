import json
from pathlib import Path

import pytest

from hf_ext import demo
from hf_ext.demo.corpus import HELD_OUT, is_held_out, is_table, sources
from hf_ext.demo.prompts import prompts

LISTING = json.loads((Path(demo.path("tokenizer")) / "corpus.json").read_text())


def test_held_out_modules_and_their_tests_are_not_among_the_files_trained_on():
    assert [name for name in LISTING["trained_on"] if is_held_out(name)] == []
    assert {f"{module}.py" for module in HELD_OUT} <= {*LISTING["held_out"]}


def test_tables_and_generated_modules_are_left_out():
    seen = {*LISTING["trained_on"], *LISTING["held_out"]}
    bad = [name for name in seen if name.startswith(("encodings/", "pydoc_data/", "site-packages/"))]
    assert bad == []
    assert "stringprep.py" not in seen
    assert "html/entities.py" not in seen


def test_a_file_of_literals_is_a_table_and_code_is_not():
    assert is_table('TABLE = {\n    "a": 1,\n    "b": 2,\n    "c": 3,\n}\n')
    assert not is_table("def f(values):\n    total = 0\n    for value in values:\n        total += value\n")


def test_the_corpus_comes_in_the_same_order_with_stable_hashes():
    first, second = ([(s.name, s.sha256) for s in sources(held_out=True)] for _ in range(2))
    assert first == second
    assert first == sorted(first)


def test_sources_takes_another_library_root(tmp_path):
    (tmp_path / "encodings").mkdir()
    code = "def f(x):\n    return x + 1\n" * 20
    for name in ("bisect.py", "other.py", "encodings/latin.py", "keyword.py"):
        (tmp_path / name).write_text(code)
    (tmp_path / "not_utf8.py").write_bytes(b"# \xff\n" * 100)
    assert [(s.name, s.held_out) for s in sources(tmp_path)] == [("bisect.py", True), ("other.py", False)]


def test_prompts_are_held_out_functions_that_fit_and_end_before_a_line_break(tokenizer):
    chosen = prompts(8, tokenizer, tokens=160)
    assert len({(p.module, p.function) for p in chosen}) == 8
    for prompt in chosen:
        assert is_held_out(prompt.module)
        assert len(tokenizer(prompt.text)["input_ids"]) <= 160
        assert prompt.text.splitlines()[0].lstrip().startswith(("def ", "@"))
        assert not prompt.text.endswith("\n")
        assert prompt.reference.strip()


def test_asking_for_too_many_prompts_says_how_many_there_are(tokenizer):
    with pytest.raises(ValueError, match=r"have \d+ suitable functions, 1000 were asked for"):
        prompts(1000, tokenizer)

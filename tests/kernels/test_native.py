"""The C kernel of packed attention against its definition in float64, and what happens where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ext.kernels import native, packed_native, packed_torch
from hf_ext.kernels.packed_attention import packed_attention_reference, packed_attention_torch
from hf_ext.kernels.packing import Packed, dequantise_keys, dequantise_values, quantise_keys, quantise_values

HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
COMPILED = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")
#: A library of its own: what `native` makes of a file is alike for all files.
SMALL = "int answer(void) { return 42; }\n"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Begin as a new process with an empty cache folder does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_EXT_NATIVE", raising=False)
    load = packed_native._load
    load.cache_clear()
    yield monkeypatch
    load.cache_clear()


@pytest.fixture(scope="module")
def library() -> Any:
    """The kernel, of which every test here would fail to say anything if it were not used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_EXT_NATIVE", raising=False)
        packed_native._load.cache_clear()
        found, reason = packed_native._loaded()
    packed_native._load.cache_clear()
    if found is None and "too short" in reason:
        pytest.skip(reason)
    assert found is not None, reason
    return found


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@COMPILED
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("width", "group", "channels"),
    [(128, 64, 64), (64, 32, 64), (96, 16, 48), (80, 7, 20), (72, 1, 8), (24, 4, 12), (4, 8, 2), (256, 8, 256)],
)
def test_both_products_are_those_of_the_definition(
    library: Any, bits: int, width: int, group: int, channels: int
) -> None:
    """The last groups are of a store with room behind them, and results lie between others."""
    for rows, key_heads, lines, tokens, threads in ((1, 2, 4, 5, 1), (2, 1, 7, 9, 2), (3, 2, 1, 40, 3)):
        tokens *= group
        held = random(rows, key_heads, tokens + 2 * group, width)
        codes, *others = quantise_keys(held, bits, group)
        keys = Packed(codes[:, :, :tokens], *(part[:, :, : tokens // group] for part in others))
        values = Packed(*(part[:, :, :tokens] for part in quantise_values(held, bits, channels)))
        query, weights = random(rows, key_heads, lines, width), random(rows, key_heads, lines, tokens + 3)
        weights = weights.softmax(-1)[..., 1:-2]
        out = torch.full((rows, key_heads, lines, tokens + 5), -7.0)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert packed_native._scores(library, query, *keys, bits, out[..., 2:-3])
            sums = packed_native._sums(library, weights, *values, bits)
        finally:
            torch.set_num_threads(before)
        assert sums is not None
        wide = [Packed(whole.codes, whole.scale.double(), whole.zero.double()) for whole in (keys, values)]
        scores = query.double() @ dequantise_keys(*wide[0], bits=bits).mT
        assert gap(out[..., 2:-3], scores) < 1e-5, (rows, gap(out[..., 2:-3], scores))
        assert (out[..., :2] == -7).all()
        assert (out[..., -3:] == -7).all()
        wanted = weights.double() @ dequantise_values(*wide[1], bits=bits)
        assert gap(sums, wanted) < 1e-5, (rows, gap(sums, wanted))


@COMPILED
def test_threads_and_other_lines_change_nothing(library: Any) -> None:
    keys, values = (call(random(2, 4, 320, 64), 4, 64) for call in (quantise_keys, quantise_values))
    query, weights = random(2, 4, 7, 64), random(2, 4, 7, 320)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            out = torch.empty(2, 4, 7, 320)
            assert packed_native._scores(library, query, *keys, 4, out)
            sums = packed_native._sums(library, weights, *values, 4)
            assert sums is not None
            found.append((out, sums))
    finally:
        torch.set_num_threads(before)
    for out, sums in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(sums, found[0][1])
    for line in range(7):
        one = torch.empty(2, 4, 1, 320)
        assert packed_native._scores(library, query[:, :, line : line + 1], *keys, 4, one)
        assert torch.equal(one[:, :, 0], found[0][0][:, :, line]), line


@COMPILED
def test_float32_goes_the_native_way_and_all_else_the_way_of_torch(library: Any, fresh: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("packed_scores", "packed_sums"):
        fresh.setattr(packed_torch, name, counted(name, getattr(packed_torch, name), asked))
    fresh.setattr(packed_native, "_load", lambda: (library, ""))

    def run(dtype: torch.dtype, query: torch.Tensor, width: int = 16) -> list[str]:
        asked.clear()
        keys = random(2, 2, 48, width).to(dtype)
        packed = [*quantise_keys(keys, 4, 8), *quantise_values(keys, 4, 8)]
        out, lse = packed_attention_torch(query.to(dtype), *packed, bits=4)
        wanted = packed_attention_reference(query.to(dtype).double(), *packed, bits=4)
        assert gap(lse.double(), wanted[1]) < 1e-5
        assert gap(out.double(), wanted[0]) < (1e-5 if dtype.itemsize > 2 else 2e-2)
        return list(asked)

    both = ["packed_scores", "packed_sums"]
    assert run(torch.float32, random(2, 4, 2, 16)) == []
    assert run(torch.bfloat16, random(2, 4, 2, 16)) == []  # which is computed in float32
    assert run(torch.float64, random(2, 4, 2, 16)) == both
    assert run(torch.float32, random(2, 4, 32, 16)) == both[:1]
    assert run(torch.float32, random(2, 4, 33, 16)) == both
    assert run(torch.float32, random(2, 2, 1, 1032), width=1032) == both
    assert run(torch.float32, random(2, 2, 4, 16).transpose(1, 2)) == []


def counted(name: str, call: Any, asked: list[str]) -> Any:
    def run(*given: Any) -> Any:
        asked.append(name)
        return call(*given)

    return run


def silent(call: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


@pytest.mark.parametrize("case", ["off", "compiler", "source", "system"])
def test_where_there_is_to_be_none_torch_is_used_without_a_word(fresh: pytest.MonkeyPatch, case: str) -> None:
    if case == "off":
        fresh.setenv("HF_EXT_NATIVE", "0")
    elif case == "compiler":
        fresh.delenv("CC", raising=False)
        fresh.setenv("PATH", "")
    elif case == "source":
        fresh.setattr(packed_native, "SOURCE", Path("packed_native.c"))
    else:
        fresh.setattr(sys, "platform", "win32")
    said = {"off": "HF_EXT_NATIVE", "compiler": "no C compiler", "source": "is not there", "system": "win32"}
    reason = silent(packed_native.in_use)
    assert reason.startswith("torch: ")
    assert said[case] in reason
    keys = quantise_keys(random(1, 1, 4, 8), 4, 4)
    out, wanted = torch.empty(2, 1, 1, 1, 4).unbind(0)
    packed_native.packed_scores(random(1, 1, 1, 8), *keys, 4, out)
    packed_torch.packed_scores(random(1, 1, 1, 8), *keys, 4, wanted)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("case", ["fails", "missing", "shared folder", "wrong results"])
def test_what_goes_wrong_is_said_once(fresh: pytest.MonkeyPatch, tmp_path: Path, case: str) -> None:
    fresh.setenv("CC", {"fails": "false", "missing": "/no/such/compiler"}.get(case, "cc"))
    said = {"fails": "could not compile", "missing": "No such file", "shared folder": "can be written by others"}
    if case == "shared folder":
        shared = tmp_path / "cache" / "hf_ext" / "native"
        shared.mkdir(parents=True)
        shared.chmod(0o777)
    if case == "wrong results":
        if not HAS_COMPILER:
            pytest.skip("there is no C compiler")
        fresh.delenv("CC")
        wrong = tmp_path / "packed_native.c"
        text = packed_native.SOURCE.read_text(encoding="utf-8")
        wrong.write_text(text.replace("found[line] + least[line]", "found[line]"), encoding="utf-8")
        fresh.setattr(packed_native, "SOURCE", wrong)
    with pytest.warns(UserWarning, match=said.get(case, "its results are wrong")) as caught:
        assert packed_native.in_use().startswith("torch: ")
    assert len(caught) == 1
    assert silent(packed_native.in_use).startswith("torch: ")


@COMPILED
def test_what_was_compiled_is_kept_and_made_again_if_it_is_damaged(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, cache = tmp_path / "small.c", tmp_path / "cache" / "hf_ext" / "native"
    source.write_text(SMALL, encoding="utf-8")
    assert native.build(source).answer() == 42
    assert cache.stat().st_mode & 0o777 == 0o700
    [kept] = cache.iterdir()
    made = kept.stat().st_mtime_ns
    assert native.build(source).answer() == 42
    assert kept.stat().st_mtime_ns == made
    whole = kept.read_bytes()
    kept.unlink()  # a loaded file is not written to
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        kept.write_bytes(damaged)
        assert native._find(cache, kept.name.partition("-")[0]) is None
        assert not kept.exists()
    native.build(source)
    assert kept.read_bytes() == whole
    fresh.setattr(native, "processor", lambda: "another")
    native.build(source)
    source.write_text(SMALL.replace("42", "43"), encoding="utf-8")
    assert native.build(source).answer() == 43
    assert len(list(cache.iterdir())) == 3


@COMPILED
def test_processes_that_compile_at_the_same_time_do_no_harm(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, where = tmp_path / "small.c", Path(native.__file__)
    source.write_text(SMALL, encoding="utf-8")
    code = (
        "import importlib.util as u, pathlib, sys\n"  # the module alone: torch takes seconds to import
        "spec = u.spec_from_file_location('native', sys.argv[1]); native = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(native); print(native.build(pathlib.Path(sys.argv[2])).answer())"
    )
    command = [sys.executable, "-c", code, str(where), str(source)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(4)
    ]
    for process in running:
        out, error = process.communicate(timeout=60)
        assert out == "42\n", error
    assert len(list((tmp_path / "cache" / "hf_ext" / "native").iterdir())) == 1

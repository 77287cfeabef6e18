"""hf_ext works from a wheel in a clean environment, from an editable install, and from a bare checkout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hf_ext import plugins

USE = textwrap.dedent(
    """
    import json, sys
    import hf_ext, hf_ext.claims, hf_ext.generation, hf_ext.modeling, hf_ext.trainer_callbacks
    from hf_ext import demo, plugins, verify
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    target = demo.path("target")
    model = AutoModelForCausalLM.from_pretrained(target)
    inputs = AutoTokenizer.from_pretrained(target)("import ", return_tensors="pt", return_token_type_ids=False)
    strategy = plugins.get("contrastive-search").load()()
    print(json.dumps({
        "file": hf_ext.__file__,
        "folders": [hf_ext.generation.__file__, hf_ext.modeling.__file__, hf_ext.trainer_callbacks.__file__],
        "loaded": [plugin.load().__name__ for plugin in plugins.all()],
        "tokens": model.generate(**inputs, custom_generate=strategy, max_new_tokens=4)[0].tolist(),
        "registered": AutoConfig.for_model("swan_gpt").model_type,
        "cards": sorted(path.name for path in verify.cards_dir().glob("*.md")),
    }))
    """
)

#: Endings of all files that are code or data.
SUFFIXES = (".c", ".py", ".json", ".jinja", ".md", ".png", ".safetensors", ".txt")


@pytest.fixture(scope="session")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from the sources."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--quiet"]
    run = subprocess.run([*command, "--wheel-dir", str(out), str(sources)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    [wheel] = out.glob("*.whl")
    return wheel


def test_wheel_holds_all_code_and_data_and_nothing_else(wheel: Path, sources: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for folder in ("hf_ext", "modeling", "generation", "trainer_callbacks", "claims", "benchmarks", "model_cards"):
        for path in (sources / folder).rglob("*"):
            if path.is_file() and path.suffix in SUFFIXES:
                inside = path.relative_to(sources)
                expected.add(str(inside if folder == "hf_ext" else "hf_ext" / inside))
    assert sorted(expected - names) == []
    packed = {name for name in names if ".dist-info/" not in name}
    assert sorted(packed - expected) == ["hf_ext/py.typed"]
    # The examples of what must be there, in case both sides forget them.
    assert {"hf_ext/demo/target/model.safetensors", "hf_ext/demo/draft/model.safetensors"} <= names
    assert {f"hf_ext/model_cards/{plugin.name}.md" for plugin in plugins.all() if plugin.claims} <= names


def test_source_distribution_holds_the_whole_checkout(sources: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    made = ("build/", "hf_ext.egg-info/")
    files = {str(path.relative_to(sources)) for path in sources.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert sorted(file for file in files - names if not file.startswith(made)) == []


def test_embedded_weights_stay_within_fourteen_megabytes(wheel: Path) -> None:
    sizes = {i.filename: i.file_size for i in zipfile.ZipFile(wheel).infolist() if i.filename.endswith(".safetensors")}
    assert 0 < sum(sizes.values()) <= 14 * 2**20, sizes


def test_wheel_in_a_clean_environment(wheel: Path, sources: Path, environment: Any, tmp_path: Path) -> None:
    environment.pip("install", wheel, cwd=tmp_path)
    used = json.loads(environment.run(environment.python, "-W", "error::UserWarning", "-c", USE, cwd=tmp_path).stdout)
    for file in [used["file"], *used["folders"]]:
        assert Path(file).is_relative_to(environment.folder), file
    assert used["loaded"] == [plugin.load().__name__ for plugin in plugins.all()]
    assert len(used["tokens"]) > 4
    assert used["registered"] == "swan_gpt"
    assert used["cards"] == sorted(path.name for path in (sources / "model_cards").glob("*.md"))
    listed = json.loads(environment.run(environment.folder / "bin" / "hf-ext", "list", "--json", cwd=tmp_path).stdout)
    assert [item["name"] for item in listed] == [plugin.name for plugin in plugins.all()]
    # What the wheel does not hold is said before anything is measured.
    refusal = environment.run(
        environment.folder / "bin" / "hf-ext", "verify", "meap", "--write", cwd=tmp_path, status=1
    )
    assert refusal.stderr.startswith("error: writing model cards needs a checkout of hf_ext"), refusal.stderr


def test_editable_install_follows_the_sources(sources: Path, environment: Any, tmp_path: Path) -> None:
    environment.pip("install", "--editable", sources, cwd=tmp_path)
    (sources / "generation" / "added_later.py").write_text("HERE = __name__\n", encoding="utf-8")
    try:
        code = "import hf_ext.generation.added_later as m, hf_ext.plugins as p; print(m.HERE, m.__file__, len(p.all()))"
        name, file, count = environment.run(environment.python, "-c", code, cwd=tmp_path).stdout.split()
    finally:
        (sources / "generation" / "added_later.py").unlink()
    assert name == "hf_ext.generation.added_later"
    assert Path(file) == sources / "generation" / "added_later.py"
    assert int(count) == len(plugins.all())
    # In the checkout itself the bare folder hf_ext/ comes first on the path; the mounted folders must be found still.
    environment.run(environment.python, "-c", "import hf_ext.generation.manifest, hf_ext.claims", cwd=sources)


def test_pytest_runs_in_a_checkout_that_is_not_installed(sources: Path, environment: Any) -> None:
    environment.run(environment.python, "-c", "import hf_ext.generation", cwd=sources, status=1)
    for start in ([environment.python, "-m", "pytest"], [environment.python, "-P", "-m", "pytest"]):
        run = environment.run(*start, "-p", "no:cacheprovider", "tests/test_plugins.py",
                              "-k", "listing_needs or sorted or third_party or taken_name", cwd=sources)  # fmt: skip
        assert re.search(r"\b9 passed", run.stdout), run.stdout

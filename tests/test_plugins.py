"""The plugin host: what a plugin is, how plugins are found, and what a broken one may not break."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hf_ext
from hf_ext import plugins
from hf_ext.plugins import Plugin, PluginError

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package as pip would leave it: a module, and a dist-info folder with an entry point."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def install(module: str, code: str, group: str = "hf_ext.plugins", attribute: str = "PLUGINS") -> None:
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}:{attribute}\n", encoding="utf-8")
        written.append(module)
        plugins.refresh()

    yield install
    for module in written:
        sys.modules.pop(module, None)
    plugins.refresh()


GOOD = """
    from hf_ext.plugins import Plugin

    class Tool:
        pass

    PLUGINS = [Plugin("third-party-tool", "tool", "Does something.", target="good_package:Tool", covers=("a-slug",))]
"""


@pytest.mark.parametrize("first", ["hf_ext.plugins", "hf_ext.generation", "hf_ext.cli"])
def test_a_checkout_below_the_working_directory_is_not_taken_for_the_package(tmp_path: Path, first: str) -> None:
    (tmp_path / "hf_ext").symlink_to(Path(__file__).resolve().parents[1])
    code = f"import sys, hf_ext, {first}; print(hf_ext.__version__, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == f"{hf_ext.__version__} False\n"


@pytest.mark.parametrize(
    "package",
    ["generation", "generation.heads", "cache", "cache.soft", "trainer_callbacks", "attention", "metrics", "hub"],
)
def test_lazy_packages_list_their_names_and_have_them(package: str) -> None:
    module = importlib.import_module(f"hf_ext.{package}")
    assert set(dir(module)) >= set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_listing_needs_neither_torch_nor_transformers() -> None:
    code = """
        import json, sys
        import hf_ext, hf_ext.plugins, hf_ext.generation, hf_ext.modeling, hf_ext.trainer_callbacks
        names = [plugin.name for plugin in hf_ext.plugins.all()]
        heavy = sorted({"torch", "transformers", "numpy"} & set(sys.modules))
        print(json.dumps({"names": names, "heavy": heavy}))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    seen = json.loads(run.stdout)
    assert seen["heavy"] == []
    assert {"contrastive-search", "cautious-decoding", "meap", "swan-gpt"} <= set(seen["names"])


def test_every_plugin_of_the_package_loads_and_says_what_it_is() -> None:
    for plugin in plugins.all():
        assert plugin.load().__name__ == plugin.target.partition(":")[2]
        assert plugin.summary, plugin.name
        assert plugin.paper, plugin.name
        assert plugin.example, plugin.name
        for target in plugin.auto.values():
            plugins.resolve(target, plugin.name)


def test_all_is_sorted_and_filters_by_kind() -> None:
    everything = plugins.all()
    assert everything == sorted(everything, key=lambda p: (p.kind, p.name))
    assert plugins.all("strategy") == [p for p in everything if p.kind == "strategy"]


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(PluginError, match=r"unknown plugin 'contrastiv-serch'; nearest: contrastive-search"):
        plugins.get("contrastiv-serch")
    with pytest.raises(PluginError, match="`hf-ext list` prints all of them"):
        plugins.get("0")


def test_a_slug_that_one_plugin_covers_finds_it() -> None:
    assert plugins.get("cautious-next-token-prediction") is plugins.get("cautious-decoding")


@pytest.mark.parametrize("group", plugins.GROUPS)
def test_third_party_plugin_is_found_in_every_group_and_used(install: Install, group: str) -> None:
    install("good_package", GOOD, group=group)
    plugin = plugins.get("third-party-tool")
    assert plugin in plugins.all()
    assert "good_package" in sys.modules
    assert plugin.load() is sys.modules["good_package"].Tool
    assert plugins.get("a-slug") is plugin


def test_an_entry_point_may_name_one_plugin(install: Install) -> None:
    install("good_package", GOOD + "    ONE = PLUGINS[0]\n", attribute="ONE")
    assert plugins.get("third-party-tool").kind == "tool"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('no licence server')", "RuntimeError: no licence server"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("def f(:", "SyntaxError"),
        ("OTHER = 1", "AttributeError"),
        ("PLUGINS = ['a string']", "TypeError: bad_package:PLUGINS holds a str, expected hf_ext.plugins.Plugin"),
        (
            "from hf_ext.plugins import Plugin\nPLUGINS = [Plugin('Bad Name', 'tool', '', target='json:loads')]",
            "ValueError: plugin name 'Bad Name' must be lower-case words joined by hyphens",
        ),
        (
            "from hf_ext.plugins import Plugin\nPLUGINS = [Plugin('name', 'tool', '', target='json')]",
            "ValueError: plugin 'name' names 'json', expected 'package.module:attribute'",
        ),
        (
            "from hf_ext.plugins import Plugin\n"
            "PLUGINS = [Plugin('name', 'model', '', target='json:loads', auto={'AutoModel': 'json:loads'})]",
            "ValueError: plugin 'name' has auto classes but no 'AutoConfig' among them",
        ),
    ],
)
def test_broken_package_is_named_and_the_others_still_work(install: Install, code: str, reason: str) -> None:
    install("good_package", GOOD)
    install("bad_package", code)
    with pytest.warns(UserWarning, match="plugin 'bad_package' of package 'bad_package' is broken") as caught:
        names = [plugin.name for plugin in plugins.all()]
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert {"third-party-tool", "contrastive-search"} <= set(names)
    [item] = plugins.broken()
    assert (item.name, item.package) == ("bad_package", "bad_package")
    assert plugins.get("third-party-tool").load()
    with pytest.raises(PluginError, match="plugin 'bad_package' of package 'bad_package' is broken"):
        plugins.get("bad_package")


def test_a_plugin_whose_class_cannot_be_imported_is_named_when_it_is_loaded(install: Install) -> None:
    install("good_package", GOOD.replace("good_package:Tool", "good_package:Lost"))
    plugin = plugins.get("third-party-tool")
    with pytest.raises(PluginError, match="plugin 'third-party-tool' cannot load 'good_package:Lost': AttributeError"):
        plugin.load()


def test_a_taken_name_stays_with_this_package_and_the_other_is_named(install: Install) -> None:
    # "aaa_package" sorts before "hf_ext", and its group is searched first.
    install("aaa_package", GOOD.replace("third-party-tool", "contrastive-search"), group="hf_ext.modeling")
    [item] = plugins.broken()
    assert (item.name, item.package) == ("contrastive-search", "aaa_package")
    assert item.error == "the name is taken by a plugin of package 'hf_ext'"
    assert plugins.get("contrastive-search").kind == "strategy"


def test_a_slug_that_several_plugins_cover_asks_for_a_name(install: Install) -> None:
    install("good_package", GOOD.replace("a-slug", "contrastive-search"))
    assert plugins.get("contrastive-search").name == "contrastive-search"  # a name goes before slugs
    install("more_package", GOOD.replace("third-party-tool", "more-tool").replace("a-slug", "meap"))
    install("even_package", GOOD.replace("third-party-tool", "even-tool").replace("a-slug", "shared"))
    install("last_package", GOOD.replace("third-party-tool", "last-tool").replace("a-slug", "shared"))
    with pytest.raises(PluginError, match="'shared' is covered by several plugins: even-tool, last-tool; name one"):
        plugins.get("shared")


def test_a_plugin_is_what_it_was_made_of() -> None:
    plugin = Plugin("a-tool", "tool", "Does it.", target="collections:OrderedDict")
    assert plugin.load() is __import__("collections").OrderedDict
    assert plugin == Plugin("a-tool", "tool", "Does it.", target="collections:OrderedDict")

"""The cards of this package's plugins: measured, valid, and their snippets run."""

import pytest

from hf_ext import plugins
from hf_ext.verify import cards_dir, claims_of, problems, snippets

ALL = [plugin for plugin in plugins.all() if plugin.target.startswith("hf_ext.")]
#: Cache policies that serve as yardsticks make no claims; tests hold them against their definitions.
OURS = [plugin.name for plugin in ALL if plugin.kind != "cache" or plugin.covers or plugin.claims]


def test_there_are_plugins_to_check():
    assert {"contrastive-search", "cautious-decoding", "swan-gpt", "meap"} <= set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_every_plugin_makes_claims_and_says_where_they_come_from(name):
    for claim in claims_of(name):
        assert claim.paper, claim.name
        assert claim.measures, claim.name
        assert claim.seconds <= 90, f"{claim.name} takes {claim.seconds} s; a check must fit into a minute and a half"


@pytest.mark.parametrize("name", OURS)
def test_card_is_valid_and_all_its_figures_were_measured(name):
    assert problems(name) == []


@pytest.mark.parametrize("name", OURS)
def test_snippet_of_the_card_runs_as_it_stands(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # some save what they have made
    for snippet in snippets((cards_dir() / f"{name}.md").read_text(encoding="utf-8")):
        exec(compile(snippet, f"{name}.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip(), "the snippet shows nothing"


def test_every_card_and_record_belongs_to_a_plugin():
    cards = {path.stem for path in cards_dir().glob("*.md")} | {
        path.stem for path in cards_dir().glob("results/*.json")
    }
    assert cards - {"README"} <= {plugin.name for plugin in plugins.all()}

"""What `write` puts into cards, and what `problems` finds wrong with them."""

import json

import pytest
from huggingface_hub import ModelCard

from hf_ext.verify import CardError, problems, run, snippets, write
from hf_ext.verify.render import stray_figures

PROSE = "\n## Limitations\n\nIt is a toy.\n\n## Citation\n\nToys.\n"


@pytest.fixture
def card(toy, tmp_path):
    """The written card of `toy`, with the hand-written sections that a complete card has."""
    root = tmp_path / "cards"
    write(run(), root=root)
    path = root / "toy.md"
    path.write_text(path.read_text() + PROSE)
    return path


def replace(path, old, new):
    text = path.read_text()
    assert old in text, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new))


def test_complete_card_has_no_problems_and_writing_again_keeps_its_prose(card):
    assert problems("toy", card.parent) == []
    before = card.read_text()
    write(run(), root=card.parent)
    assert card.read_text() == before


def test_card_shows_each_claim_with_figure_spread_and_verdict(card):
    text = card.read_text()
    assert "| `exact`: It changes nothing. | tokens that differ | `== 0` | 0 tokens | reproduced |" in text
    assert "`>= 0.25` | 0.125 [0.0625, 0.25] | **not reproduced** |" in text
    assert "It helps \\| a lot." in text
    assert "(reported only) | 0.3125 | measured |" in text
    assert "plain 0.5; ours 0.625; in brackets: 95 % interval over 8 prompts; seeds 0, 1" in text
    assert "| `size` | `int` | `3` | how large it is. |" in text


def test_card_names_hardware_versions_date_and_command(card):
    record = json.loads((card.parent / "results" / "toy.json").read_text())
    text = card.read_text()
    for value in (
        record["date"],
        record["hardware"]["cpu"],
        "`hf-ext verify toy --write`",
        "torch 2",
        "transformers 5",
    ):
        assert value in text, value
    assert record["hardware"]["threads"] >= 1
    assert {"python", "torch", "transformers", "hf_ext"} == set(record["versions"])


def test_metadata_is_valid_for_the_hub_and_carries_the_figures(card):
    data = ModelCard.load(card).data
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        "exact": 0,
        "better": 0.125,
        "reported": 0.3125,
    }
    assert data.model_name == "toy"
    assert {"custom_generate", "hf_ext"} <= set(data.tags)
    assert {r.dataset_type for r in data.eval_results} == {"synthetic", "held-out-functions"}


def test_check_that_failed_stands_on_the_card_as_an_error(toy, tmp_path):
    toy.CLAIMS = (toy.exact, toy.broken)
    write(run(), root=tmp_path)
    assert "error: RuntimeError: the disk is made of cheese | **error** |" in (tmp_path / "toy.md").read_text()
    assert any("ended in an error" in problem for problem in problems("toy", tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("0.125 [0.0625, 0.25]", "0.925 [0.0625, 0.25]", "generated parts"),
        ("value: 0.125", "value: 0.925", "generated parts"),
        ("**not reproduced**", "reproduced", "generated parts"),
        ("| `3` | how large", "| `4` | how large", "generated parts"),
        ("It is a toy.", "It is 3.5 times better.", "prose quotes figures that no claim check produced: 3.5"),
        ("It is a toy.", "It wins 90 % of the time.", "produced: 90"),
        ("## Limitations", "## Praise", "sections missing: Limitations"),
        ("- custom_generate\n", "", "tag custom_generate"),
        ("- hf_ext\n", "", "tag hf_ext"),
        ("license: apache-2.0\n", "", "lacks license"),
        ("```python", "```text", "no Python snippet"),
        ("<!-- claims:end -->", "", "exactly one block"),
    ],
)
def test_card_that_was_tampered_with_is_found_out(card, old, new, problem):
    replace(card, old, new)
    found = problems("toy", card.parent)
    assert any(problem in item for item in found), found


def test_prose_may_quote_a_figure_that_was_measured(card):
    replace(card, "It is a toy.", "It gained 0.125, from 0.5, see `python3.11` and arXiv:2202.06417.")
    assert problems("toy", card.parent) == []


def test_record_must_cover_exactly_the_present_claims(card, toy):
    from dataclasses import replace as changed

    from hf_ext.verify import Threshold

    toy.CLAIMS = (toy.exact, toy.better)
    assert problems("toy", card.parent) == ["the record holds the claim 'reported', which the plugin does not make"]
    toy.CLAIMS = (toy.exact, toy.better, toy.reported, toy.broken)
    assert problems("toy", card.parent) == ["the record lacks the claim 'broken'"]
    toy.CLAIMS = (toy.exact, changed(toy.better, threshold=Threshold(">=", 0.1)), toy.reported)
    assert "the claim 'better' has changed since it was measured" in problems("toy", card.parent)


def test_verdict_edited_in_the_record_contradicts_its_figure(card):
    record = card.parent / "results" / "toy.json"
    replace(record, '"status": "not reproduced",\n   "passed": false', '"status": "reproduced",\n   "passed": true')
    assert "the record's verdict on 'better' contradicts its figure" in problems("toy", card.parent)


def test_figures_measured_with_other_embedded_models_are_out_of_date(card, monkeypatch):
    monkeypatch.setattr("hf_ext.verify.stamp.weights", lambda: {"target": "other", "draft": "other"})
    assert problems("toy", card.parent) == ["the figures were measured with other embedded models than those installed"]


def test_missing_card_is_named_with_the_command_that_writes_it(toy, tmp_path):
    assert problems("toy", tmp_path) == ["toy.md and toy.json missing; run `hf-ext verify toy --write`"]


def test_results_for_only_some_claims_are_refused_and_nothing_is_written(toy, tmp_path):
    with pytest.raises(CardError, match="no results for the claims better, reported of toy"):
        write(run()[:1], root=tmp_path / "cards")
    assert not (tmp_path / "cards").exists()


def test_card_without_readable_metadata_is_refused_and_left_alone(card):
    record = (card.parent / "results" / "toy.json").read_text()
    card.write_text("---\nlicense: [\n---\n# toy\n")
    with pytest.raises(CardError, match="metadata"):
        write(run(), root=card.parent)
    assert card.read_text() == "---\nlicense: [\n---\n# toy\n"
    assert (card.parent / "results" / "toy.json").read_text() == record


def test_installed_package_refuses_to_write_and_says_what_to_do(toy, tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "hf_ext"
    (package / "model_cards").mkdir(parents=True)
    monkeypatch.setattr("hf_ext.__file__", str(package / "__init__.py"))
    with pytest.raises(CardError, match="needs a checkout of hf_ext"):
        write(run())
    assert list((package / "model_cards").iterdir()) == []


def test_folder_that_cannot_be_written_is_one_clear_error(toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CardError, match="cannot write the model cards in"):
        write(run(), root=tmp_path / "file")


def test_only_the_snippets_under_use_are_the_cards_snippets():
    card = "# x\n```python\n0\n```\n## Use\n```bash\n1\n```\n```python\n2\n```\n## Options\n```python\n3\n```\n"
    assert snippets(card) == ["2\n"]


def test_code_links_and_generated_blocks_are_not_prose():
    body = "`0.6` https://x.y/1.5 arXiv:2202.06417\n```\n9.9\n```\n<!-- claims:begin -->7.7<!-- claims:end --> 4.25x"
    assert stray_figures(body, {"claims": []}) == ["4.25"]

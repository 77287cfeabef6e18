"""Claims, thresholds and the runner."""

import json
import math

import pytest

from hf_ext.plugins import PluginError
from hf_ext.verify import Claim, Measurement, Threshold, run


@pytest.mark.parametrize(
    ("op", "below", "equal", "above"),
    [("==", False, True, False), ("<=", True, True, False), ("<", True, False, False),
     (">=", False, True, True), (">", False, False, True)],
)  # fmt: skip
def test_threshold_compares_as_its_operator_says(op, below, equal, above):
    threshold = Threshold(op, 0.5)
    assert (threshold.holds(0.4), threshold.holds(0.5), threshold.holds(0.6)) == (below, equal, above)


def test_threshold_refuses_an_unknown_operator_and_a_value_that_is_no_number():
    with pytest.raises(ValueError, match="'!=' is unknown"):
        Threshold("!=", 0)
    with pytest.raises(ValueError, match="finite"):
        Threshold("<=", math.nan)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"value": math.nan}, ValueError, "no figure"),
        ({"value": math.inf}, ValueError, "no figure"),
        ({"value": True}, TypeError, "plain number"),
        ({"value": "3"}, TypeError, "plain number"),
        ({"value": 1, "spread": (2, 1), "spread_of": "range"}, ValueError, "low, high"),
        ({"value": 1, "spread": (1, 2)}, ValueError, "spread_of"),
        ({"value": 1, "details": {"a": [1, {"b": object()}]}}, TypeError, r"details\['a'\]\[1\]\['b'\] is a object"),
        ({"value": 1, "details": {"a": math.nan}}, ValueError, r"details\['a'\] is nan"),
        ({"value": 1, "details": {3: 1}}, TypeError, "keys must be strings"),
    ],
)
def test_measurement_refuses_what_a_record_could_not_hold(arguments, error, message):
    with pytest.raises(error, match=message):
        Measurement(**arguments)


def test_every_check_is_judged_by_its_own_threshold_in_the_order_of_the_file(toy):
    results = run()
    assert [(r.claim.name, r.status, r.passed) for r in results] == [
        ("exact", "reproduced", True),
        ("better", "not reproduced", False),
        ("reported", "measured", None),
    ]


def test_threshold_that_holds_for_the_figure_but_not_over_its_spread_is_inconclusive(toy):
    spread = {"spread": (-0.1, 0.4), "spread_of": "range of 3 seeds"}
    toy.CLAIMS = (
        Claim("maybe", "p", "m", Threshold(">", 0), lambda: Measurement(0.2, **spread)),
        Claim("no", "p", "m", Threshold(">", 0.3), lambda: Measurement(0.2, **spread)),
        Claim("yes", "p", "m", Threshold(">", -0.2), lambda: Measurement(0.2, **spread)),
    )
    assert [(r.status, r.passed) for r in run(["toy"])] == [
        ("inconclusive", False),
        ("not reproduced", False),
        ("reproduced", True),
    ]


def test_check_that_raises_is_reported_with_its_text_and_the_others_still_run(toy):
    toy.CLAIMS = (toy.broken, toy.exact)
    first, second = run(["toy"])
    assert (first.status, first.passed, first.measurement) == ("error", None, None)
    assert first.error == "RuntimeError: the disk is made of cheese"
    assert second.status == "reproduced"


def test_check_that_returns_something_else_is_an_error(toy):
    toy.CLAIMS = (Claim("bare", "p", "m", None, lambda: 3.0),)
    assert "returned a float, expected hf_ext.verify.Measurement" in run()[0].error


def test_results_are_handed_over_as_they_come_and_are_json(toy):
    seen = []
    results = run(on_result=seen.append)
    assert seen == results
    assert json.loads(json.dumps([r.to_dict() for r in results], allow_nan=False))[1]["measurement"]["seeds"] == [0, 1]


def test_progress_goes_to_the_error_stream_and_leaves_the_output_alone(toy, capsys):
    run(progress=True)
    assert capsys.readouterr().out == ""


def test_unknown_plugin_is_refused_before_any_check_runs(toy):
    ran = []
    toy.CLAIMS = (Claim("notes", "p", "m", None, lambda: ran.append(1) or Measurement(1)),)
    with pytest.raises(PluginError, match="unknown plugin 'toyy'; nearest: toy"):
        run(["toy", "toyy"])
    assert not ran


@pytest.mark.parametrize("claims", [(), ("exact",), "twice"])
def test_claims_must_be_claims_with_distinct_names(toy, claims):
    toy.CLAIMS = (toy.exact, toy.exact) if claims == "twice" else claims
    with pytest.raises(PluginError, match="distinct names"):
        run(["toy"])


def test_naming_a_plugin_twice_runs_it_once(toy):
    assert len(run(["toy", "toy"])) == 3

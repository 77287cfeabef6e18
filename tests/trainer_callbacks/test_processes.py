"""Every objective in two processes, with DDP and with FSDP, and loaded again without `hf_ext`: three starts for all.

What is trained is found in the tests beside this one: each class there that runs `ObjectiveInProcess`.
"""

from pathlib import Path

import pytest
import torch

from hf_ext import plugins
from hf_ext.testing import objective_launch as launching
from hf_ext.testing.objective import ObjectiveConformance, ObjectiveInProcess
from hf_ext.testing.objective_preferences import PreferencesInProcess
from hf_ext.testing.objective_processes import DESCENT
from hf_ext.testing.objective_training import logged, weights
from hf_ext.trainer_callbacks import Objective

# those that run `ObjectiveConformance` start processes of their own
SUITES = launching.suites_in(
    Path(__file__).parent.glob("test_*.py"), ObjectiveInProcess, PreferencesInProcess, but=ObjectiveConformance
)
#: One of each kind: a change of the batch, a loss, a step. What adapters and FSDP do together is the engine's affair.
WITH_ADAPTERS = [suite for suite in SUITES if suite.__name__ in ("TestCorruption", "TestTokenLossAttached", "TestStep")]


def chosen(request, test):
    """Return the suites for which `test` was selected, so that `-k` starts no more than it asks for."""
    return [
        item.callspec.params["suite"]
        for item in request.session.items
        if item.path == request.path and item.originalname == test
    ]


@pytest.fixture(scope="module")
def launched(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    plain = chosen(request, "test_two_processes_train_what_one_process_does")
    adapters = chosen(request, "test_adapters_train_under_fsdp_as_in_one_process")
    launching.launch(
        [launching.Case.of(suite) for suite in SUITES if suite in plain],
        folder,
        [launching.Case.of(suite) for suite in adapters],
    )
    return folder


@pytest.fixture(scope="module")
def loaded(request, tmp_path_factory):
    """Logits of the models that were saved and loaded again, beside those of the models that were trained."""
    folder = tmp_path_factory.mktemp("saved")
    suites = chosen(request, "test_saved_model_loads_without_hf_ext")
    folders = [folder / launching.Case.of(suite).id for suite in suites]
    expected = [launching.save_trained(suite(), into) for suite, into in zip(suites, folders, strict=True)]
    found = launching.load_without_hf_ext(folders)
    return {suite: pair for suite, *pair in zip(suites, expected, found, strict=True)}


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: launching.Case.of(suite).id)
@pytest.mark.parametrize("mode", launching.MODES)
def test_two_processes_train_what_one_process_does(suite, mode, launched):
    launching.compare(suite(), mode, launched)


@pytest.mark.parametrize("suite", WITH_ADAPTERS, ids=lambda suite: launching.Case.of(suite).id)
def test_adapters_train_under_fsdp_as_in_one_process(suite, launched):
    launching.compare(suite(), launching.ADAPTERS, launched)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: launching.Case.of(suite).id)
def test_saved_model_loads_without_hf_ext(suite, loaded):
    expected, found = loaded[suite]
    difference = float((found - expected).abs().max())
    assert difference <= 1e-6, f"logits differ by up to {difference:.3g}"


def test_every_registered_objective_runs_the_suite():
    registered = {plugin.name: plugins.get(plugin.name).load() for plugin in plugins.all("objective")}
    ours = {name: cls for name, cls in registered.items() if cls.__module__.startswith("hf_ext.")}
    tested = {suite.objective for suite in SUITES}
    missing = [
        name for name, cls in ours.items() if issubclass(cls, Objective) and not any(issubclass(t, cls) for t in tested)
    ]
    assert not missing, f"no class in tests/trainer_callbacks runs ObjectiveInProcess for: {', '.join(missing)}"


def test_a_class_that_another_process_could_not_find_is_refused():
    class TestHidden(ObjectiveInProcess):
        objective = Objective

    with pytest.raises(ValueError, match="must stand at the top level of a test file"):
        launching.Case.of(TestHidden)


def test_weights_that_one_process_would_not_get_are_found(tmp_path):
    suite = next(suite for suite in SUITES if suite.__name__ == "TestCorruption")()
    case, model = launching.Case.of(type(suite)), suite.model()
    trainer = suite.run(model, suite.make(), **DESCENT)
    found = {"weights": weights(model), "loss": logged(trainer, "loss"), "clean_loss": logged(trainer, "clean_loss")}
    model.save_pretrained(tmp_path / f"{case.id}-fsdp")
    wrong = {**found["weights"], "lm_head.weight": found["weights"]["lm_head.weight"] + 0.25}
    for first, second, message in (
        (found, {**found, "weights": wrong}, "the processes' weights differ by up to 0.25"),
        ({**found, "weights": wrong}, {**found, "weights": wrong}, "two processes under fsdp and one differ by up to"),
        ({**found, "clean_loss": [0.0, 0.0]}, found, "clean_loss under fsdp is"),
    ):
        for rank, part in enumerate((first, second)):
            torch.save(part, tmp_path / f"{case.id}-fsdp-{rank}.pt")
        with pytest.raises(AssertionError, match=message):
            launching.compare(suite, "fsdp", tmp_path)


def test_a_failure_in_a_process_is_told_with_its_trace(tmp_path):
    suite = SUITES[0]
    case = launching.Case.of(suite)
    for rank in (0, 1):
        torch.save({"error": "ValueError: no", "trace": "the trace"}, tmp_path / f"{case.id}-ddp-{rank}.pt")
    with pytest.raises(AssertionError, match="under ddp it failed: the trace"):
        launching.compare(suite(), "ddp", tmp_path)

"""The conformance suite of decoding strategies: what every one of them has to keep to."""

from __future__ import annotations

from collections.abc import Callable

from hf_ext.testing.strategy_outputs import OutputChecks
from hf_ext.testing.strategy_refusals import RefusalChecks
from hf_ext.testing.strategy_rows import RowChecks


class StrategyConformance(RowChecks, OutputChecks, RefusalChecks):
    """Checks that any strategy, of this package or of another, runs through under pytest.

    Subclass it in a test module under a name that starts with `Test` and define `strategy()`.
    Everything runs on tiny models built in memory (`hf_ext.testing.tiny_models`), on the CPU.

    Attributes:
        models: kinds of decoder-only models that the checks which depend on the model run on; those which hardly
            do run on the two that differ most.
        encoder_decoders: likewise for encoder-decoders; a strategy with `encoder_decoder = False`
            has to refuse them.
        new_tokens: tokens a run.

    Most checks compare tokens and therefore run without chance: as they are for a strategy with
    `samples = False`, under `do_sample=True, top_k=1` for one that samples. A strategy that needs
    other settings for that overrides `exact()`.

    Example:
        >>> from hf_ext.generation import ContrastiveSearch
        >>> class TestMine(StrategyConformance):
        ...     models = ("llama",)
        ...     def strategy(self):
        ...         return ContrastiveSearch(penalty_alpha=0.5, top_k=3)
        >>> failures(TestMine, only="test_max_time_ends_the_run")
        {}
    """


def failures(suite: type[StrategyConformance], only: str = "", report: Callable[[str], None] | None = None) -> dict:
    """Run the checks of a suite without pytest.

    Args:
        suite: the subclass of `StrategyConformance`.
        only: run the checks whose names hold this text.
        report: is told the name of each check before it runs.

    Returns:
        The message of each failed check by the check's name and, in brackets, its model.
    """
    found = {}
    instance = suite()
    for check in sorted(name for name in dir(suite) if name.startswith("test_") and only in name):
        for arguments in instance.cases(check):
            name = "".join([check, *(f"[{kind}]" for kind in arguments.values())])
            if report is not None:
                report(name)
            try:
                getattr(instance, check)(**arguments)
            except Exception as error:  # whatever it is, the check has failed
                found[name] = f"{type(error).__name__}: {error}"
    return found

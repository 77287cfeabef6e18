"""Run claim checks, one plugin after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from hf_ext import plugins
from hf_ext.verify.claim import Claim, Measurement, Result


def claims_of(name: str) -> tuple[Claim, ...]:
    """Return the claims of the plugin called `name`, in the order of its file.

    Raises:
        PluginError: no such plugin; it names no claim checks; or what it names is not a sequence of claims.
    """
    plugin = plugins.get(name)
    if not plugin.claims:
        raise plugins.PluginError(
            f"plugin {plugin.name!r} names no claim checks; set Plugin.claims to 'package.module:CLAIMS'"
        )
    claims = tuple(plugins.resolve(plugin.claims, plugin.name))
    names = [claim.name if isinstance(claim, Claim) else claim for claim in claims]
    if not claims or len(set(names)) < len(names) or any(not isinstance(claim, Claim) for claim in claims):
        raise plugins.PluginError(
            f"{plugin.claims} must hold hf_ext.verify.Claim objects with distinct names, found {names}"
        )
    return claims


def run(
    names: Sequence[str] | None = None,
    progress: bool = False,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run the claim checks of the named plugins.

    A check that raises gives a result with `status == "error"` and the exception's text; the
    other checks still run.

    Args:
        names: plugin names; all plugins that name claim checks by default.
        progress: show a progress bar on the standard error stream.
        on_result: called with each result as soon as it is there.

    Returns:
        One result per claim, grouped by plugin.

    Raises:
        PluginError: a name is unknown or its claims cannot be loaded; raised before any check runs.

    Example:
        >>> run([])
        []
    """
    if names is None:
        names = [plugin.name for plugin in plugins.all() if plugin.claims]
    todo = [(plugins.get(name).name, claim) for name in dict.fromkeys(names) for claim in claims_of(name)]
    results = []
    with _Bar(sum(claim.seconds for _, claim in todo), show=progress) as bar:
        for plugin, claim in todo:
            bar.start(f"{plugin}: {claim.name}")
            result = run_one(plugin, claim)
            bar.advance(claim.seconds)
            results.append(result)
            if on_result is not None:
                on_result(result)
    return results


def run_one(plugin: str, claim: Claim) -> Result:
    """Run one check and judge what it measured."""
    start = time.perf_counter()
    try:
        measurement = claim.check()
        if not isinstance(measurement, Measurement):
            raise TypeError(f"the check returned a {type(measurement).__name__}, expected hf_ext.verify.Measurement")
    except Exception as error:  # reported as the result of this claim; the other claims still run
        seconds = time.perf_counter() - start
        return Result(plugin, claim, None, None, seconds, error=f"{type(error).__name__}: {error}")
    return Result(plugin, claim, measurement, claim.judge(measurement), time.perf_counter() - start)


class _Bar:
    """A rich progress bar over the estimated seconds, or nothing."""

    def __init__(self, seconds: float, show: bool) -> None:
        self.seconds, self.show = seconds, show

    def __enter__(self) -> _Bar:
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("claim checks", total=self.seconds)
        return self

    def start(self, text: str) -> None:
        if self.show:
            self.bar.update(self.task, description=text)

    def advance(self, seconds: float) -> None:
        if self.show:
            self.bar.advance(self.task, seconds)

    def __exit__(self, *exc: object) -> None:
        if self.show:
            self.bar.stop()

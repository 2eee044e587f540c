"""A progress bar over passes, with the time that is left."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mechinterp.engine.plan import Plan


class Bar:
    """Shows one bar on standard error for all passes of a round; nothing when that is no terminal."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty())
        self._task = None

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, plan: Plan, round_number: int) -> None:
        total = sum(p.rows if p.what == "sweep" else p.batches for p in plan.passes if p.what != "sweep runs")
        self.start(f"round {round_number}: passes and rows", total)

    def start(self, what: str, total: int) -> None:
        self._task = self._progress.add_task(what, total=total)

    def advance(self, what: str, steps: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, steps)

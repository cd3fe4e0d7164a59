"""Bars on stderr, one for each stage of long work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class CountColumn(ProgressColumn):
    """Done of total, with separators."""

    def render(self, task: Task) -> Text:
        """Return the count, and nothing while the total is unknown."""
        if task.total is None:
            return Text("")
        return Text(f"{int(task.completed):,}/{int(task.total):,}", style="progress.download")


class TimeColumn(ProgressColumn):
    """Time left while there is some, time spent once done."""

    def __init__(self) -> None:
        super().__init__()
        self._left, self._spent = TimeRemainingColumn(compact=True), TimeElapsedColumn()

    def render(self, task: Task) -> Text:
        """Return either."""
        return self._spent.render(task) if task.finished else self._left.render(task)


class StageBars:
    """A progress callback that shows each stage as a bar.

    Parameters
    ----------
    titles : mapping of str to str
        What to call each stage that is reported.

    Notes
    -----
    A context manager. After an error or Ctrl-C the bars vanish, so that what is said about it
    stands alone.
    """

    def __init__(self, titles: Mapping[str, str]) -> None:
        self._titles = titles
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            CountColumn(),
            TimeColumn(),
            console=Console(stderr=True),
            redirect_stdout=False,
        )

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move a stage's bar; its total is 0 where it is not known."""
        if stage not in self._tasks:
            title = self._titles.get(stage, stage)
            self._tasks[stage] = self._progress.add_task(title, total=None)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)

    def __enter__(self) -> StageBars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._progress.stop()
            return
        self._progress.live.transient = True
        self._progress.live.stop()


@contextmanager
def waiting(title: str, *, is_shown: bool = True) -> Iterator[None]:
    """Show that something of unknown length goes on, on a terminal."""
    if not is_shown:
        yield
        return
    with Console(stderr=True).status(title):
        yield

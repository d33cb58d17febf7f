"""A job's progress on the terminal, with the estimate that the job itself gives."""

from __future__ import annotations

from types import TracebackType

from rich import progress as bars

from codegraft.common.v1.job_pb2 import JobState, JobStatus, Progress
from services.cli.output import err
from services.client.words import duration


class JobBar:
    """One progress bar on stderr; nothing but the final lines where stderr is no terminal.

    The time left is the worker's own (from its smoothed rate), and a dash while it can say nothing honest.
    """

    def __init__(self, title: str) -> None:
        self._progress = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=30),
            bars.TextColumn("{task.fields[count]}"),
            bars.TextColumn("{task.fields[rest]}"),
            bars.TimeElapsedColumn(),
            console=err,
            disable=not err.is_terminal,
            transient=True,
        )
        self._title = title
        self._task = self._progress.add_task(title, total=None, count="", rest="")

    def __enter__(self) -> JobBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, status: JobStatus) -> None:
        """Takes the job as it is now."""
        if status.state == JobState.JOB_STATE_QUEUED:
            place = status.progress.message if status.progress.message.startswith("waits") else "waits for a worker"
            self._progress.update(self._task, description=f"{self._title}: {place}")
            return
        if status.state == JobState.JOB_STATE_PAUSED:
            self._progress.update(self._task, description=f"{self._title}: paused", rest="")
            return
        self.show_progress(status.progress)

    def show_progress(self, progress: Progress) -> None:
        """Takes the progress of what is no job (a source's fetch)."""
        self._progress.update(
            self._task,
            description=f"{self._title}: {progress.message}" if progress.message else self._title,
            completed=progress.done,
            total=progress.total or None,
            count=count(progress),
            rest=time_left(progress),
        )

    def tell(self, line: str) -> None:
        """A line above the bar."""
        self._progress.console.print(line)


def count(progress: Progress) -> str:
    """``12/80 steps``; without the total while it is unknown."""
    if not progress.unit:
        return ""
    total = f"/{progress.total:,.0f}" if progress.total else ""
    return f"{progress.done:,.0f}{total} {progress.unit}"


def time_left(progress: Progress) -> str:
    """``about 3 min left``, or a dash while the job can give no estimate."""
    return f"about {duration(progress.eta_seconds)} left" if progress.HasField("eta_seconds") else "-"

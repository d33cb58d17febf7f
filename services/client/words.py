"""Values as people read them, on a terminal and on a page."""

from __future__ import annotations

from codegraft.common.v1.job_pb2 import JobState


def duration(seconds: float) -> str:
    """Two units at most, no false precision."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s" if whole < 600 else f"{round(whole / 60)} min"
    hours = whole // 3600
    return f"{hours} h {whole % 3600 // 60:02d} min" if hours < 48 else f"{whole / 86400:.1f} days"


def state_word(state: JobState) -> str:
    """``running`` for JOB_STATE_RUNNING."""
    return JobState.Name(state).removeprefix("JOB_STATE_").lower()

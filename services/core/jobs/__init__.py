"""Jobs: their states, the queue that hands them out, and the runner that works on them."""

from services.core.jobs.context import JobContext
from services.core.jobs.memory import MemoryQueue
from services.core.jobs.queue import Delivery, JobQueue
from services.core.jobs.runner import JobRunner
from services.core.jobs.states import (
    advance,
    is_final,
    new_status,
    request_cancel,
    request_pause,
    request_resume,
)

__all__ = [
    "Delivery",
    "JobContext",
    "JobQueue",
    "JobRunner",
    "MemoryQueue",
    "advance",
    "is_final",
    "new_status",
    "request_cancel",
    "request_pause",
    "request_resume",
]

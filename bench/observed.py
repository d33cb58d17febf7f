"""The inference service with its engine's steps and flips noted: what `bench.swap` runs in place of the service.

At its end it writes to the file that BENCH_NOTES names, in JSON: steps ``[begin, end, processor time]`` and flips
``[begin, end]``, in seconds on the monotonic clock, which the machine's processes share. The processor time is the
engine's thread's: with one thread for a step's arithmetic it says what a step costs, whatever else the machine does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from services.core.runtime import run
from services.inference.__main__ import main
from services.inference.adapters.registry import Registry
from services.inference.adapters.route import Route
from services.inference.config import InferenceSettings
from services.inference.engine.engine import Engine

steps: list[tuple[float, float, float]] = []
flips: list[tuple[float, float]] = []
_step, _flip = Engine._step, Registry.flip


def noted_step(engine: Engine, work: list[Any]) -> None:
    began, processor = time.monotonic(), time.thread_time()
    _step(engine, work)
    steps.append((began, time.monotonic(), time.thread_time() - processor))


def noted_flip(registry: Registry, project: str, route: Route) -> Route:
    began = time.monotonic()
    before = _flip(registry, project, route)
    flips.append((began, time.monotonic()))
    return before


if __name__ == "__main__":
    Engine._step, Registry.flip = noted_step, noted_flip  # type: ignore[method-assign, assignment]
    status = run("inference", InferenceSettings, main)
    Path(os.environ["BENCH_NOTES"]).write_text(json.dumps({"steps": steps, "flips": flips}))
    sys.exit(status)

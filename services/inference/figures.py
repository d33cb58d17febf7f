"""The figures of inference. Those of the engine are read at the scrape (collector.py): its loop pays for none."""

from __future__ import annotations

import time
from collections.abc import Iterable

from codegraft.event.v1.events_pb2 import SwapPhases
from codegraft.inference.v1.feedback_pb2 import FeedbackEvent
from services.core.telemetry.metrics import OTHER, PROJECTS, SHORT, collected, counter, histogram
from services.inference.adapters.route import Version
from services.inference.engine.sequence import Sequence

_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
"""Seconds between two tokens."""

COMPLETIONS = counter(
    "codegraft_inference_completions_total", "Completions whose end was told, by why they ended.", "reason"
)
QUEUE_SECONDS = histogram(
    "codegraft_inference_queue_seconds", "From a completion's arrival at the engine to the begin of its first step."
)
FIRST_TOKEN_SECONDS = histogram(
    "gen_ai_server_time_to_first_token_seconds", "From a completion's arrival at the engine to its first token."
)
TOKEN_SECONDS = histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Time between two tokens, one mean for each completion of more than one.",
    buckets=_TOKEN,
)

QUEUE_DEPTH = collected(
    "codegraft_inference_queue_depth",
    "Completions that wait for a place in the engine, by project. KEDA scales by the sum of a namespace.",
    "namespace",
    "project",
)
QUEUE_OLDEST = collected("codegraft_inference_queue_oldest_seconds", "How long the first of them has waited.")
RUNNING = collected("codegraft_inference_running", "Completions in the engine's steps.")
PLACES = collected("codegraft_inference_places", "Most completions in one step (inference_max_running).")
KV_USE = collected("codegraft_inference_kv_use_ratio", "Share of the KV cache that running completions hold.")
KV_CACHED = collected("codegraft_inference_kv_cached_blocks", "Blocks of 16 tokens that a new prompt may find there.")
PROMPT_TOKENS = collected(
    "codegraft_inference_prompt_tokens_total", "Prompt tokens of the completions that got a place.", kind="counter"
)
CACHED_TOKENS = collected(
    "codegraft_inference_cached_prompt_tokens_total",
    "Those of them that were in the KV cache already: over all, the prefix hit rate.",
    kind="counter",
)
GENERATED_TOKENS = collected(
    "codegraft_inference_generated_tokens_total", "Tokens that were generated; its rate is tokens/s.", kind="counter"
)
DRAFTED_TOKENS = collected("codegraft_inference_drafted_tokens_total", "Tokens that were guessed.", kind="counter")
RIGHT_TOKENS = collected(
    "codegraft_inference_right_tokens_total", "Those of them that the model would have chosen itself.", kind="counter"
)
PREEMPTIONS = collected(
    "codegraft_inference_preemptions_total", "Times that a completion gave up its memory to others.", kind="counter"
)

MODEL_LOADED = collected("codegraft_inference_model_loaded", "Whether the base model is loaded.", "model")
ADAPTERS = collected(
    "codegraft_inference_adapters",
    "Adapters in device memory: serving (a project's requests go there), or idle.",
    "state",
)
STREAMS = collected(
    "codegraft_inference_streams",
    "Completions that run, by project and version (begin of the adapter's SHA-256; base).",
    "project",
    "version",
)
BEHIND = collected(
    "codegraft_inference_adapter_behind",
    "Whether the replica serves another version than the project's policy resolves to.",
    "project",
)
WAITING = collected(
    "codegraft_inference_adapter_waiting", "Whether a best checkpoint waits for a person's approval.", "project"
)
SWAP_SECONDS = histogram(
    "codegraft_inference_swap_seconds",
    "Swaps of adapters by phase: fetch, verify, wait (for a place), stage, probe; total is from noticing to serving.",
    "phase",
    buckets=(0.001, *SHORT),
)
FEEDBACK = counter(
    "codegraft_inference_feedback_total",
    "What became of completions in editors, by project, version that made them (begin of the adapter's SHA-256; base, "
    "which is the control; other, for those that the replica does not hold any more) and event: shown, accepted, "
    "rejected, edited. Acceptance is accepted over shown.",
    "project",
    "version",
    "event",
)
REFUSED = counter("codegraft_inference_adapters_refused_total", "Adapters that were not served, by reason.", "reason")


def finished(sequence: Sequence, reason: str) -> None:
    """Counts a completion that has ended; on the event loop, not in the engine's thread."""
    COMPLETIONS.labels(reason).inc()
    if sequence.start_time is not None:
        QUEUE_SECONDS.observe(sequence.start_time - sequence.submit_time)
    if sequence.first_token_time is not None:
        FIRST_TOKEN_SECONDS.observe(sequence.first_token_time - sequence.submit_time)
        if sequence.generated > 1:
            TOKEN_SECONDS.observe((time.monotonic() - sequence.first_token_time) / (sequence.generated - 1))


def told(project: str, version: Version | None, sha256: str, events: Iterable[FeedbackEvent]) -> None:
    """Counts feedback that is news.

    Args:
        version: that made the completion, while the replica holds it: ids are what callers send, and anything could
            be in one.
        sha256: of its weights, as the completion's id says; empty for the base model.
    """
    label = (sha256[:12] if version else OTHER) if sha256 else "base"
    for event in events:
        word = FeedbackEvent.Name(event).removeprefix("FEEDBACK_EVENT_").lower()
        FEEDBACK.labels(PROJECTS.of(project), label, word).inc()


def swapped(phases: SwapPhases, seconds: float) -> None:
    """Counts a swap; phases that it did not need are left out."""
    SWAP_SECONDS.labels("total").observe(seconds)
    for phase in SwapPhases.DESCRIPTOR.fields_by_name:
        if took := getattr(phases, phase):
            SWAP_SECONDS.labels(phase).observe(took)

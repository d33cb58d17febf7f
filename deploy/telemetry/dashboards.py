"""Makes the Grafana dashboards beside it: ``python3 deploy/telemetry/dashboards.py``. Needs nothing but Python.

A panel is its title, its unit, and its queries with what their lines are called. A test makes them again, compares, and
looks up every figure that a query names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
OURS = 'app_kubernetes_io_part_of="codegraft"'
COMPONENT = "app_kubernetes_io_component"
Lines = tuple[tuple[str, str], ...]
"""PromQL, and the name of its lines ({{label}})."""


@dataclass(frozen=True)
class Panel:
    """One diagram."""

    title: str
    unit: str
    """Grafana's: s, short, percentunit, bytes, ops."""
    queries: Lines


def each(labels: str) -> str:
    """The name of lines that differ in these labels."""
    return " ".join("{{" + label.strip() + "}}" for label in labels.split(","))


def rate(counter: str, by: str = "", where: str = "", over: str = "5m") -> str:
    """How fast a counter grows, over all replicas."""
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate({counter}{'{' + where + '}' if where else ''}[{over}]))"


def rates(counter: str, by: str, where: str = "") -> Lines:
    """One line for each value of the labels."""
    return ((rate(counter, by, where), each(by)),)


def most(gauge: str, by: str) -> Lines:
    """A figure that every replica tells, or that is bad enough at one of them."""
    return ((f"max by ({by}) ({gauge})", each(by)),)


def total(gauge: str, by: str) -> Lines:
    """A figure of which every replica has its part."""
    return ((f"sum by ({by}) ({gauge})", each(by)),)


def share(part: str, whole: str, name: str) -> Lines:
    """The share of one counter in another."""
    return ((f"{rate(part)} / {rate(whole)}", name),)


def quantiles(histogram: str) -> Lines:
    """Half, 95 and 99 per cent of a histogram of seconds."""
    buckets = rate(f"{histogram}_bucket", "le")
    return tuple((f"histogram_quantile({q}, {buckets})", f"p{round(q * 100)}") for q in (0.5, 0.95, 0.99))


def p95(histogram: str, by: str, where: str = "", over: str = "5m") -> Lines:
    """95 per cent for each value of a label."""
    buckets = rate(f"{histogram}_bucket", f"le, {by}", where, over)
    return ((f"histogram_quantile(0.95, {buckets})", f"p95 {each(by)}"),)


RPC = "rpc_server_call_duration_seconds"
HTTP = "http_server_request_duration_seconds"
AT_ONCE = (("sum(http_server_active_requests)", "requests"),)
STATUS = "rpc_response_status_code"
ALONE = (
    ("sum(codegraft_quota_alone)", "now"),
    ("sum by (reason) (increase(codegraft_quota_fallbacks_total[1h]))", "began within the hour: {{reason}}"),
)
SINCE_RATES = ("time() - (codegraft_quota_last_received_timestamp_seconds > 0)", "{{instance}}")
OVERVIEW = (
    Panel("Services that answer", "short", total(f"up{{{OURS}}}", COMPONENT)),
    Panel("Calls", "ops", rates(f"{RPC}_count", "rpc_method")),
    Panel("Failed calls", "ops", rates(f"{RPC}_count", f"rpc_method, {STATUS}", f'{STATUS}!~"OK|CANCELLED"')),
    Panel("Calls without streams", "s", p95(RPC, "rpc_method", 'rpc_method!~".*/(Watch.*|Complete|Chat|Upload.*)"')),
    Panel("HTTP requests", "ops", rates(f"{HTTP}_count", "operation, http_response_status_code")),
    Panel("HTTP requests at once", "short", AT_ONCE),
    Panel("Duration of HTTP requests", "s", p95(HTTP, "operation")),
    Panel("Refused by quotas", "ops", rates("codegraft_quota_refusals_total", "quota, owner")),
    Panel("Messages about used rates", "ops", rates("codegraft_quota_messages_total", "direction")),
    Panel("Processes that count rates alone", "short", ALONE),
    Panel("Processes that share rates, as each hears", "short", most("codegraft_quota_peers", "instance")),
    Panel("Since one heard another's rates", "s", (SINCE_RATES,)),
    Panel("Connected to NATS", "short", (("min by (connection) (codegraft_nats_connected)", "{{connection}}"),)),
    Panel("Failed requests to NATS", "ops", ((rate("codegraft_nats_errors_total"), "failed"),)),
    Panel("Failed requests to the object store", "ops", rates("codegraft_store_errors_total", "reason")),
    Panel("Requests to the object store", "s", quantiles("codegraft_store_request_seconds")),
    Panel("Events", "ops", rates("codegraft_events_published_total", "type")),
    Panel("Memory of the processes", "bytes", most(f"process_resident_memory_bytes{{{OURS}}}", "instance")),
    Panel("Free disk", "percentunit", (("codegraft_cache_free_bytes / codegraft_cache_size_bytes", "{{instance}}"),)),
)

HERE = "codegraft_inference_"
PROMPT, CACHED = f"{HERE}prompt_tokens_total", f"{HERE}cached_prompt_tokens_total"
TOKENS = ((rate(f"{HERE}generated_tokens_total", over="1m"), "generated"), (rate(PROMPT, over="1m"), "of prompts"))
FEEDBACK = "codegraft_inference_feedback_total"
ACCEPTANCE: Lines = (
    (
        " / ".join(
            rate(FEEDBACK, "project, version", f'event="{event}"', over="1d") for event in ("accepted", "shown")
        ),
        each("project, version"),
    ),
)
"""Of suggestions that were shown; base is the control."""
SHOWN_IN_AN_HOUR = f'sum by (project, version) (increase({FEEDBACK}{{event="shown"}}[1h]))'

COMPLETIONS = (
    Panel("Tokens per second", "short", TOKENS),
    Panel("Time to first token", "s", quantiles("gen_ai_server_time_to_first_token_seconds")),
    Panel("Time between tokens", "s", quantiles("gen_ai_server_time_per_output_token_seconds")),
    Panel("Queue", "short", total(f"{HERE}queue_depth", "project")),
    Panel("Age of the first that waits", "s", most(f"{HERE}queue_oldest_seconds", "instance")),
    Panel("Waiting in the queue", "s", quantiles(f"{HERE}queue_seconds")),
    Panel("Running", "short", ((f"sum({HERE}running)", "running"), (f"sum({HERE}places)", "places"))),
    Panel("Ended", "ops", rates(f"{HERE}completions_total", "reason")),
    Panel("KV cache in use", "percentunit", most(f"{HERE}kv_use_ratio", "instance")),
    Panel("Blocks that prompts may find", "short", total(f"{HERE}kv_cached_blocks", "instance")),
    Panel("Prefix hit rate", "percentunit", share(CACHED, PROMPT, "cached")),
    Panel(
        "Guesses that were right",
        "percentunit",
        share(f"{HERE}right_tokens_total", f"{HERE}drafted_tokens_total", "right"),
    ),
    Panel("Memory given up", "ops", ((rate(f"{HERE}preemptions_total"), "preemptions"),)),
    Panel("In flight by version", "short", total(f"{HERE}streams", "project, version")),
    Panel("Adapters in device memory", "short", total(f"{HERE}adapters", "instance, state")),
    Panel("Acceptance by version, a day", "percentunit", ACCEPTANCE),
    Panel("Shown by version, an hour", "short", ((SHOWN_IN_AN_HOUR, each("project, version")),)),
    Panel("Swaps", "s", p95(f"{HERE}swap_seconds", "phase", over="1h")),
    Panel("Behind their policy", "short", most(f"{HERE}adapter_behind", "project")),
    Panel("Waiting for approval", "short", most(f"{HERE}adapter_waiting", "project")),
    Panel("Adapters refused", "ops", rates(f"{HERE}adapters_refused_total", "reason")),
    Panel("Models loaded", "short", total(f"{HERE}model_loaded", "model")),
)

AGE = "time() - (max by (kind) (codegraft_job_oldest_queued_timestamp_seconds) > 0)"
THERE = "codegraft_trainer_"
LOSSES = tuple((f"{THERE}{one}", f"{{{{project}}}} {one}") for one in ("train_loss", "test_loss", "base_test_loss"))
JOBS = (
    Panel("Jobs", "short", most("codegraft_jobs", "kind, state")),
    Panel("Age of the first that waits", "s", ((AGE, "{{kind}}"),)),
    Panel("Attempts that ended", "ops", rates("codegraft_job_attempt_seconds_count", "kind, outcome")),
    Panel("Parts of scans", "ops", rates("codegraft_part_seconds_count", "kind, outcome")),
    Panel("Parts that wait", "short", total("codegraft_parts_waiting", "kind")),
    Panel("Given up", "ops", rates("codegraft_jobs_dead_total", "kind")),
    Panel("Sources", "short", most("codegraft_ingest_sources", "state")),
    Panel("Fetches", "s", p95("codegraft_ingest_fetch_seconds", "outcome", over="1h")),
    Panel("Fetched files", "ops", ((rate("codegraft_ingest_files_total"), "files"),)),
    Panel("New contents", "bytes", ((rate("codegraft_ingest_stored_bytes_total"), "bytes per second"),)),
    Panel("Stages of scans", "s", p95("codegraft_scanner_stage_seconds", "stage", over="1h")),
    Panel("Verdicts", "ops", rates("codegraft_scanner_files_total", "reason")),
    Panel("Loss (nats per token)", "short", LOSSES),
    Panel("Tokens per second while training", "short", most(f"{THERE}tokens_per_second", "project")),
    Panel("Tokens per second over all", "short", ((rate(f"{THERE}tokens_total"), "tokens"),)),
    Panel("Steps", "ops", ((rate(f"{THERE}steps_total"), "steps"),)),
    Panel("New bests", "ops", ((rate(f"{THERE}bests_total", over="1h"), "bests"),)),
    Panel("Evaluations", "s", quantiles(f"{THERE}evaluation_seconds")),
    Panel("Checkpoints", "s", quantiles(f"{THERE}commit_seconds")),
)
DASHBOARDS = {
    "codegraft-overview": ("Codegraft", OVERVIEW),
    "codegraft-completions": ("Codegraft: completions", COMPLETIONS),
    "codegraft-jobs": ("Codegraft: sources, scans, runs", JOBS),
}


def dashboard(uid: str, title: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    """As Grafana's HTTP API and its provisioning take it."""
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "uid": uid,
        "title": title,
        "tags": ["codegraft"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [
            {
                "id": number + 1,
                "type": "timeseries",
                "title": panel.title,
                "datasource": source,
                "gridPos": {
                    "x": number % COLUMNS * WIDTH,
                    "y": number // COLUMNS * HEIGHT,
                    "w": WIDTH,
                    "h": HEIGHT,
                },
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
                "targets": [
                    {"refId": chr(ord("A") + index), "datasource": source, "expr": query, "legendFormat": name}
                    for index, (query, name) in enumerate(panel.queries)
                ],
            }
            for number, panel in enumerate(panels)
        ],
    }


def texts() -> dict[str, str]:
    """The files' contents by name."""
    return {
        f"{uid}.json": json.dumps(dashboard(uid, title, panels), indent=2) + "\n"
        for uid, (title, panels) in DASHBOARDS.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in texts().items():
        (FOLDER / name).write_text(text)

"""The ``codegraft`` command: every group of commands in one place, and one way to end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from services.cli import (
    acceptance,
    adapters,
    audit,
    complete,
    completions,
    credential,
    key,
    manifest,
    models,
    project,
    quota,
    scan,
    serve,
    snapshot,
    source,
    stack,
    train,
    workers,
)
from services.cli.control.backup import backup
from services.cli.control.rebuild import rebuild
from services.cli.control.restore import restore
from services.cli.demo.command import demo
from services.cli.doctor.command import doctor
from services.cli.output import EXIT_CODES, ExitCode, err, fail
from services.core.errors import CodegraftError
from services.core.telemetry import tracing

app = typer.Typer(
    name="codegraft",
    help="Better code completions from your own code, on your own machines.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (stack.up, stack.down, stack.status, stack.console, doctor):
    app.command(rich_help_panel="Local stack", epilog=EXIT_CODES)(command)
app.command(rich_help_panel="Control state", epilog=EXIT_CODES)(backup)
app.command(rich_help_panel="Control state", epilog=EXIT_CODES)(restore)
app.command(rich_help_panel="Control state", epilog=EXIT_CODES)(rebuild)
train.app.command()(adapters.download)
train.app.command()(adapters.upload)
train.app.command()(manifest.manifest)
for name, group in (
    ("key", key.app),
    ("quota", quota.app),
    ("project", project.app),
    ("source", source.app),
    ("credential", credential.app),
    ("snapshot", snapshot.app),
    ("scan", scan.app),
    ("models", models.app),
    ("train", train.app),
    ("serve", serve.app),
    ("completions", completions.app),
):
    app.add_typer(group, name=name, rich_help_panel="From code to completions", epilog=EXIT_CODES)
app.command(rich_help_panel="From code to completions", epilog=EXIT_CODES)(complete.complete)
app.command(rich_help_panel="From code to completions", epilog=EXIT_CODES)(audit.audit)
app.command(rich_help_panel="From code to completions", epilog=EXIT_CODES)(workers.workers)
app.command(rich_help_panel="From code to completions", epilog=EXIT_CODES)(acceptance.acceptance)


app.command(rich_help_panel="From code to completions", epilog=EXIT_CODES)(demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        with tracing.under(os.environ.get("TRACEPARENT", "")):  # of a script that is traced as a whole
            app(args=arguments, prog_name="codegraft")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.OK
    except CodegraftError as error:
        return fail(error, as_json="--json" in arguments and arguments[0] != "demo")  # there it names a file
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception as error:
        if os.environ.get("CODEGRAFT_LOG_LEVEL") == "debug":
            traceback.print_exc()
        err.print(f"error: {type(error).__name__}: {error}")
        err.print("hint:  this is a defect of codegraft; CODEGRAFT_LOG_LEVEL=debug shows where it is.")
        return ExitCode.FAILED
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())

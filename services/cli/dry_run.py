"""``codegraft scan dry-run``: stage 1 over a folder of this machine, without any service."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from codegraft.scanner.v1 import scan_pb2
from services.cli.output import Json, out, print_json, print_table
from services.core.errors import FailedPrecondition


class Secrets(StrEnum):
    """What happens to a file that holds a secret."""

    REJECT = "reject"
    REDACT = "redact"
    IGNORE = "ignore"


def dry_run(
    path: Annotated[Path, typer.Argument(help="A folder, or a git work tree: then the files that git tracks.")],
    exclude: Annotated[list[str] | None, typer.Option(help="Mask of files to reject, in .gitignore syntax.")] = None,
    force_include: Annotated[list[str] | None, typer.Option(help="Mask of files that masks cannot reject.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language to use; every one if left out.")] = None,
    language_off: Annotated[list[str] | None, typer.Option(help="Language to leave out.")] = None,
    exclude_license: Annotated[list[str] | None, typer.Option(help="Licence to leave out, by SPDX id.")] = None,
    max_file_bytes: Annotated[int | None, typer.Option(help="Largest accepted file.")] = None,
    max_digit_share: Annotated[float | None, typer.Option(help="Largest accepted share of digits.")] = None,
    near_duplicates: Annotated[
        bool | None, typer.Option("--near-duplicates/--no-near-duplicates", help="Reject near-duplicates.")
    ] = None,
    secrets: Annotated[Secrets | None, typer.Option(help="What happens to files with secrets.")] = None,
    gitattributes: Annotated[bool, typer.Option("--gitattributes", help="Honour .gitattributes.")] = False,
    rejected: Annotated[bool, typer.Option("--rejected", help="Only rejected files.")] = False,
    json: Json = False,
) -> None:
    """Show what stage 1 of a scan would decide about every file of a folder. Needs no service.

    With --json a line for each file: path, size, sha256, language, generated, vendored, documentation, binary, reason,
    reasons, detail.

    Example: codegraft scan dry-run . --rejected
    """
    try:
        from services.core.config import CoreSettings, load
        from services.scanner import local, rules
        from services.scanner.secrets import finder
    except ImportError as error:
        raise FailedPrecondition(f"{error.name} is not installed", hint="pip install 'codegraft[scanner]'") from error
    settings = scan_pb2.ScanSettings(
        exclude=exclude or (),
        force_include=force_include or (),
        languages=language or (),
        languages_off=language_off or (),
        exclude_licenses=exclude_license or (),
        max_file_bytes=max_file_bytes,
        max_digit_share=max_digit_share,
        near_duplicates=near_duplicates,
        secrets=f"SECRET_POLICY_{secrets.name}" if secrets else None,
    )
    found_by = None if secrets == Secrets.IGNORE else finder(load(CoreSettings).cache_dir)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for found in local.scan(path, rules.resolve(settings), found_by, honour_gitattributes=gitattributes):
        verdict = found.verdict
        counts[verdict.reason] += 1
        sizes[verdict.reason] += verdict.size
        if rejected and verdict.accepted:
            continue
        if json:
            print_json(
                {
                    "path": verdict.path,
                    "size": verdict.size,
                    "sha256": verdict.sha256,
                    "language": verdict.language,
                    "generated": found.traits.generated,
                    "vendored": found.traits.vendored,
                    "documentation": found.is_documentation,
                    "binary": found.is_binary,
                    "reason": verdict.reason,
                    "reasons": list(verdict.reasons),
                    "detail": verdict.detail,
                }
            )
        else:
            out.print(f"{verdict.reason:17} {verdict.path}" + (f"  ({verdict.detail})" if verdict.detail else ""))
    if not json:
        rows = [[reason, count, sizes[reason]] for reason, count in counts.most_common()]
        print_table(["REASON", "FILES", "BYTES"], rows, empty=f"{path} holds no file")

"""The settings of a scan as a form."""

from __future__ import annotations

from codegraft.scanner.v1.scan_pb2 import ScanSettings
from services.gateway.console import settings
from services.gateway.console.forms import Form
from services.gateway.console.settings import Setting, Settings

_setting = Settings(ScanSettings)

GROUPS: tuple[tuple[str, tuple[Setting, ...]], ...] = (
    (
        "Rules",
        (
            _setting("max_file_bytes", "Largest file", "bytes", "Default 524288."),
            _setting("max_digit_share", "Largest share of digits", "0 to 1", "Default 0.30."),
            _setting(
                "exclude", "Leave out", "masks, one a line", "Besides the project's and the sources'.", lines=True
            ),
            _setting("force_include", "Take in any case", "masks, one a line", lines=True),
            _setting("languages", "Only these languages", "linguist's names, one a line", lines=True),
            _setting("languages_off", "Without these languages", "one a line", "Besides the project's.", lines=True),
            _setting("exclude_licenses", "Without these licences", "SPDX ids", "GPL-* stands for all such."),
            _setting("reject_vendored", "Reject vendored files", hint="Default on."),
            _setting("reject_generated", "Reject generated files", hint="Default on."),
            _setting("near_duplicates", "Reject near-duplicates", hint="Default on."),
            _setting("near_threshold", "Similarity that makes one", "0 to 1", "Default 0.7."),
            _setting("secrets", "Files with secrets", hint="Default: they are rejected."),
        ),
    ),
    (
        "Loss under the base model",
        (
            _setting("loss_filter", "Measure losses", hint="Default on."),
            _setting("max_loss", "Largest loss", "nats per token", "Default 3.0."),
            _setting("loss_mad", "Or per language: median + … MAD", "a number", "In place of the largest loss."),
            _setting("min_tokens", "Fewest tokens", "tokens", "Default 32."),
            _setting("max_tokens_per_file", "Read at most", "tokens of a file", "Default 4096."),
            _setting("window_tokens", "In windows of", "tokens", "Default 512."),
            _setting("model", "Base model", "id", "Default: the deployment's."),
        ),
    ),
    (
        "Split",
        (
            _setting("test_share", "Share of test files", "0 to 1", "Default 0.05, of the files split automatically."),
            _setting("seed", "Seed", "a whole number", "Default 0."),
        ),
    ),
)
"""Every setting, in the order of the form."""
SETTINGS = tuple(setting for _, group in GROUPS for setting in group)


def of_form(form: Form) -> ScanSettings:
    """What the form asks for; fields that are empty take the service's defaults.

    Raises:
        InvalidArgument: a field holds no such value; names it.
    """
    found = ScanSettings()
    settings.read(found, SETTINGS, form)
    return found

"""File masks in .gitignore syntax."""

from __future__ import annotations

from collections.abc import Sequence

from pathspec import GitIgnoreSpec

from services.core.errors import InvalidMask


class Masks:
    """A list of masks; as in .gitignore, the last one that matches decides, and ``!`` takes back.

    Raises:
        InvalidMask: a line is no pattern; names the field it stood in.
    """

    def __init__(self, patterns: Sequence[str], *, field: str = "exclude") -> None:
        self.patterns = tuple(patterns)
        for pattern in self.patterns:
            try:
                GitIgnoreSpec.from_lines([pattern])
            except ValueError as error:
                raise InvalidMask(
                    f"{pattern[:200]!r} is not a valid mask: {error}",
                    field=field,
                    hint="Write masks as in .gitignore, for example docs/** or *.min.js.",
                ) from None
        self._spec = GitIgnoreSpec.from_lines(self.patterns)

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def match(self, path: str) -> str | None:
        """The mask that matches the path; None when none does."""
        if not self.patterns:
            return None
        found = self._spec.check_file(path)
        return self.patterns[found.index] if found.include and found.index is not None else None

"""What a file without a path is called, so that its prompt tells the language, as all documents of the training do."""

from __future__ import annotations

_ENDINGS = {
    "c": ".c",
    "c#": ".cs",
    "c++": ".cpp",
    "clojure": ".clj",
    "css": ".css",
    "dart": ".dart",
    "elixir": ".ex",
    "erlang": ".erl",
    "f#": ".fs",
    "fortran": ".f90",
    "go": ".go",
    "groovy": ".groovy",
    "haskell": ".hs",
    "hcl": ".tf",
    "html": ".html",
    "java": ".java",
    "javascript": ".js",
    "json": ".json",
    "julia": ".jl",
    "kotlin": ".kt",
    "lua": ".lua",
    "markdown": ".md",
    "ocaml": ".ml",
    "objective-c": ".m",
    "perl": ".pl",
    "php": ".php",
    "powershell": ".ps1",
    "protocol buffer": ".proto",
    "python": ".py",
    "r": ".r",
    "ruby": ".rb",
    "rust": ".rs",
    "scala": ".scala",
    "shell": ".sh",
    "sql": ".sql",
    "swift": ".swift",
    "tsx": ".tsx",
    "typescript": ".ts",
    "vue": ".vue",
    "xml": ".xml",
    "yaml": ".yaml",
    "zig": ".zig",
}
"""By linguist's name of the language, in small letters."""


def path_of(path: str, language: str) -> str:
    """The path in the prompt of a file: its own; of one that has none, a name with the ending of its language.

    Empty where the language is not known: then the text alone has to tell.
    """
    ending = _ENDINGS.get(language.strip().lower())
    return path or (f"untitled{ending}" if ending else "")

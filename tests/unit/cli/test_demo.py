"""What the demo works on, and what the streams saw of a swap."""

from __future__ import annotations

import tarfile
from pathlib import Path

from services.cli.demo import editor
from services.cli.demo.editor import Stream
from services.cli.demo.material import HELD_OUT, find_package


def test_looking_back_at_a_swap() -> None:
    streams = [
        Stream("", 0.0, 0.5, 1.0, whole=True),
        Stream("", 1.0, 1.5, 3.0, whole=True),
        Stream("new", 3.0, 3.25, 4.0, whole=True),
        Stream("new", 4.0, 0.0, 4.5, whole=False),
    ]
    swap = editor.look_back(streams, "new", published=2.0, served=2.25)
    assert swap == editor.Swap(streams=4, broken=1, over_the_swap=1, first_token_seconds=1.25)


def test_the_package_is_packed_with_its_held_out_file(tmp_path: Path) -> None:
    package = find_package()
    package.pack(tmp_path / "p.tar.gz")
    with tarfile.open(tmp_path / "p.tar.gz") as archive:
        packed = set(archive.getnames())
    assert f"minio/{HELD_OUT}" in packed and "minio/api.py" in packed
    assert package.text(HELD_OUT) == package.text(f"minio/{HELD_OUT}")

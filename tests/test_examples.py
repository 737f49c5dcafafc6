"""The examples, as a user runs them: from another folder, in a process of their own, without a download."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    "offline_batch.py": (["--model", "random"], r"\d+ tokens in \d+ steps\n$"),
    "streaming.py": (["--model", "random"], r"blocks in use: [1-9]\d*\nblocks in use after closing: 0\n$"),
    "custom_decode_loop.py": ([], r"the same tokens as dense attention; 24 blocks for 95 tokens\n$"),
}


def run_python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_example_is_run_here() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path) -> None:
    arguments, ending = EXAMPLES[name]
    result = run_python([str(ROOT / "examples" / name), *arguments], tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(ending, result.stdout), result.stdout


def test_readme_example_runs(tmp_path: Path) -> None:
    """As it stands, but for the model, which is the random one here."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- example -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert found is not None
    code = found[1]
    assert len(code.splitlines()) == 6
    assert '"smollm2-135m-instruct"' in code
    result = run_python(["-c", code.replace("smollm2-135m-instruct", "random")], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_example_in_the_docs_of_the_ops_runs(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "ops.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    result = run_python(["-c", found[1] + "\nassert out.shape == query.shape and out.isfinite().all()"], tmp_path)
    assert result.returncode == 0, result.stderr

"""The package: what importing it costs and loads, what the wheel and the sdist hold, and that they work elsewhere."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pagedattn

ROOT = Path(__file__).resolve().parents[1]
# What only some uses need, and the engine: `import pagedattn` must not load them.
LOADED_ON_USE = (
    "pagedattn.engine",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "jinja2",
    "huggingface_hub",
    "rich",
    "matplotlib",
)


def run_python(code: str, folder: Path, **environment: str) -> str:
    """The stdout of ``code`` run in ``folder`` by a Python of its own."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it, without network."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    # In a copy: a build leaves folders behind.
    ignored = shutil.ignore_patterns(".git", ".venv*", "*.egg-info", "build", "dist", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="session")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


def source_modules() -> set[str]:
    """Every Python file of the package, by its installed path."""
    return {
        str(Path(prefix) / path.relative_to(ROOT / folder))
        for folder, prefix in (
            ("pagedattn", "pagedattn"),
            ("kernels", "pagedattn/kernels"),
            ("engine", "pagedattn/engine"),
        )
        for path in (ROOT / folder).rglob("*.py")
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = {"pagedattn/py.typed", "pagedattn/engine/data/demo_prompts.jsonl"}
    data |= {f"pagedattn/engine/data/machines/{path.name}" for path in (ROOT / "engine/data/machines").glob("*.json")}
    assert data <= names
    assert {name for name in names if name.endswith(".py")} == source_modules()
    assert all(name.startswith("pagedattn/") for name in names)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    assert f"Version: {pagedattn.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    core = [line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE) if "extra ==" not in line]
    assert [re.match(r"[a-z]+", line).group() for line in core] == ["torch", "numpy", "triton"]  # type: ignore[union-attr]
    assert 'platform_system == "Linux"' in core[2]
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    assert extras == {"models", "demo", "bench", "test", "dev", "all"}
    (scripts,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "pagedattn = pagedattn.engine.cli:main" in archive.read(scripts).decode()
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import importlib.util, pagedattn\n"
        "from pagedattn.engine.cli import main\n"
        "assert importlib.util.find_spec('kernels') is None, 'kernels is a top-level name'\n"
        "assert importlib.util.find_spec('engine') is None, 'engine is a top-level name'\n"
        "print(pagedattn.__file__)\n"
        "main(['generate', '--model', 'random', '--device', 'cpu', '--max-tokens', '2', 'hello'])\n"
    )
    assert run_python(code, elsewhere, PYTHONPATH=str(site)).startswith(str(site))


def test_the_sdist_holds_what_a_developer_needs(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", ".ci/run", "pyproject.toml", "setup.py"} <= names
    assert {
        "engine/engine.py",
        "kernels/plan.py",
        "pagedattn/ops.py",
        "tests/test_package.py",
        "docs/errors.md",
    } <= names
    assert not {name for name in names if name.startswith(("pagedattn/kernels/", "pagedattn/engine/", ".git/"))}


def test_importing_loads_torch_and_the_ops_only(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import pagedattn\n"
        f"loaded = [name for name in {LOADED_ON_USE!r} if name in sys.modules and name not in before]\n"
        "assert not loaded, loaded\n"
        "assert pagedattn.LLM.__module__ == 'pagedattn.engine.llm'\n"
        "assert pagedattn.SamplingParams().max_tokens == 16\n"
    )
    run_python(code, tmp_path, PYTHONPATH=str(ROOT), TRITON_INTERPRET="0")


def test_everything_in_all_exists() -> None:
    for name in pagedattn.__all__:
        assert getattr(pagedattn, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'paged_attentoin'"):
        _ = pagedattn.paged_attentoin


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("kernels", ("pagedattn.engine", "pagedattn.ops", "benchmarks")), ("engine", ("pagedattn.kernels", "benchmarks"))],
)
def test_imports_point_one_way(package: str, forbidden: tuple[str, ...]) -> None:
    """engine -> pagedattn.ops -> kernels."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                continue
            wrong = [name for name in imported if name.startswith(forbidden)]
            assert not wrong, f"{path.name} imports {wrong}"


def test_readme_commands_use_the_documented_torch_and_extras() -> None:
    """.ci/run takes its test command from under the same marker."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = dict(re.findall(r"<!-- command: (\w+) -->\n```sh\n(.*?)```", readme, re.DOTALL))
    assert set(commands) == {"demo", "test"}
    for name, command in commands.items():
        assert f"""pip install "${{PAGEDATTN_TORCH:-torch}}" -e '.[{name}]'""" in command
    assert commands["demo"].splitlines()[-1] == ".venv/bin/pagedattn demo"
    assert commands["test"].splitlines()[-1] == ".venv/bin/python -m tests"


def test_readme_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

"""Fixtures that several parts of the suite share, and which machine may run which test."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.device import IS_CUDA

CPU_ONLY = ("test_attention_reference.py", "test_compile.py")


# Shells start background jobs with SIGINT ignored, and that is inherited; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
IS_SPREAD = "PYTEST_XDIST_WORKER" in os.environ
if IS_SPREAD:
    torch.set_num_threads(1)  # one process a core: more threads would only wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--error-table", type=Path, help="write the table of errors over budget to this JSON file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, all tests of the ops and kernels run on it, and ``-m gpu`` selects them."""
    if not IS_CUDA:
        return
    for item in items:
        if item.path.parent.name in ("kernels", "pagedattn") and item.path.name not in CPU_ONLY:
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A plain ``pytest`` runs what this process can; ``python -m tests`` starts one for each level."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("interpret") and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 before torch is imported")


def pytest_runtest_teardown() -> None:
    """Processes that share a GPU keep no more of its memory than they use."""
    if IS_SPREAD and IS_CUDA:
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The worst error over budget of every feature that ``test_drawn_configurations`` met, in one table."""
    properties = [dict(report.user_properties) for report in terminalreporter.stats.get("passed", [])]
    drawn = [found for found in properties if "error_ratio" in found]
    if not drawn:
        return
    worst: dict[str, list[float]] = {}
    for found in drawn:
        for axis, choice in found["error_ratio"]["variant"].items():
            worst.setdefault(f"{axis} = {choice.removeprefix('torch.')}", []).append(found["error_ratio"]["worst"])
    num_draws = sum(found["draws"] for found in drawn)
    terminalreporter.section(f"error over budget: {num_draws} draws of {len(drawn)} variants")
    for feature in sorted(worst):
        terminalreporter.line(f"{feature:40} worst {max(worst[feature]):.2f} of {len(worst[feature])} variants")
    if config.getoption("error_table") and not hasattr(config, "workerinput"):  # of a spread run, the whole alone
        document = {
            "num_draws": num_draws,
            "num_variants": len(drawn),
            "worst": max(found["error_ratio"]["worst"] for found in drawn),
            "features": {name: {"variants": len(all_), "worst": max(all_)} for name, all_ in sorted(worst.items())},
        }
        config.getoption("error_table").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, fetched if it is not cached: a test that cannot have it fails."""
    from pagedattn.engine import model_store

    return model_store.resolve(model_store.DEFAULT_MODEL)

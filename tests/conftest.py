"""Fixtures that several parts of the suite share, and which machine may run which test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A plain ``pytest`` runs what this process can; ``python -m tests`` starts one for each level."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("interpret") and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 before torch is imported")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, fetched if it is not cached: a test that cannot have it fails."""
    from pagedattn.engine import model_store

    return model_store.resolve(model_store.DEFAULT_MODEL)

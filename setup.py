"""Package metadata. Pure Python: nothing is compiled at install, Triton compiles kernels on first use.

``kernels/`` and ``engine/`` stand at the top of the tree and are installed as ``pagedattn.kernels`` and
``pagedattn.engine``; the symlinks ``pagedattn/kernels`` and ``pagedattn/engine`` give the same names uninstalled.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

# Lower bounds are the lowest versions that tests have run on.
MODELS = [
    "tokenizers>=0.23",
    "safetensors>=0.8",
    "huggingface-hub>=1.33",
    "jinja2>=3.1.6",
    "gguf>=0.19",
    "filelock>=4",
    "platformdirs>=4.14",
]
DEMO = [*MODELS, "rich>=15", "matplotlib>=3.11"]
BENCH = [*DEMO, "transformers>=5.17", "accelerate>=1.15", "pytest>=9", "pytest-benchmark>=5.3"]
TEST = [
    *DEMO,
    "transformers>=5.17",
    "accelerate>=1.15",
    "pytest>=9",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "hypothesis>=6.170",
    "build>=1.6",
    "setuptools>=84",
]
DEV = [*TEST, "ruff>=0.17", "mypy>=2.4"]

setup(
    name="pagedattn",
    version=runpy.run_path(str(ROOT / "pagedattn" / "_version.py"))["__version__"],
    description="Paged attention ops for torch in Triton, and a small engine that serves transformers with them",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=["pagedattn", "pagedattn.kernels", "pagedattn.engine", "pagedattn.engine.simulation"],
    package_dir={"pagedattn.kernels": "kernels", "pagedattn.engine": "engine"},
    package_data={
        "pagedattn": ["py.typed"],
        "pagedattn.engine": ["data/*.jsonl", "data/machines/*.json"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.11",
        "numpy>=2.3",
        "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
    ],
    extras_require={
        "models": MODELS,
        "demo": DEMO,
        "bench": BENCH,
        "test": TEST,
        "dev": DEV,
        "all": sorted({*BENCH, *DEV}),
    },
    entry_points={"console_scripts": ["pagedattn = pagedattn.engine.cli:main"]},
    zip_safe=False,
)

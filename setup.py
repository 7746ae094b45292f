"""The packages of the wheel. What else describes the project is in pyproject.toml.

The configs lie beside the package in a checkout, where `--config configs/NAME.py` finds them, and inside
it where it is installed, where `--config NAME` does.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["llave_jax*"]), "llave_jax.configs"],
    package_dir={"llave_jax.configs": "configs"},
)

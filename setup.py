"""The configurations of `configs/` travel as the data of `mifo_lightning.configs`; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mifo_lightning*"]), "mifo_lightning.configs"],
    package_dir={"mifo_lightning.configs": "configs"},
)

"""All of the package is in pyproject.toml. Here: setuptools packs whatever an earlier build left in its folder."""

from tempfile import TemporaryDirectory

from setuptools import setup

folder = TemporaryDirectory()
setup(options={"build": {"build_base": folder.name}})

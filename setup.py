"""Nothing but the hook that old installers look for: all metadata is in setup.cfg."""

from setuptools import setup

setup()

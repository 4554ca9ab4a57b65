"""The files beside the package; all else that describes it is in setup.cfg."""

from pathlib import Path

from setuptools import setup

# `make wheel` writes them; an installation from a checkout does without.
FILES = (
    "share/man/man1/gollama-proxy.1",
    "share/bash-completion/completions/gollama-proxy",
    "share/zsh/site-functions/_gollama-proxy",
    "share/fish/vendor_completions.d/gollama-proxy.fish",
)

setup(data_files=[(str(Path(f).parent), [f]) for f in FILES if Path(f).exists()])

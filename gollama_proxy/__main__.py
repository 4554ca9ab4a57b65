"""Lets `python -m gollama_proxy` be the command line."""

import sys

from gollama_proxy.cli import main

if __name__ == "__main__":
    sys.exit(main())

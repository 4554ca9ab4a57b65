"""Runs the command line as `python -m gollama_proxy`."""

import sys

from gollama_proxy.cli import main

if __name__ == "__main__":
    sys.exit(main())

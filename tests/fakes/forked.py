"""The program as scripts of tests run it: a fork, with their files, folder and signals.

It is run by `python -IS`, which takes a tenth of the time that the program takes to
start.  `FORKS` in the environment is the descriptor of `forks.orders()`.
"""

import json
import os
import signal
import socket
import sys


def main() -> int:
    ours, theirs = os.pipe()
    order = "gollama_proxy", sys.argv[1:], dict(os.environ), os.getcwd()  # noqa: PTH109
    data = json.dumps(order).encode()
    orders = socket.socket(fileno=int(os.environ["FORKS"]))
    message = len(data).to_bytes(4, "big") + data
    socket.send_fds(orders, [message], [theirs, 0, 1, 2])
    orders.detach()
    os.close(theirs)
    with os.fdopen(ours, "rb", 0) as reports:
        pid = int(reports.readline())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int(reports.readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main())

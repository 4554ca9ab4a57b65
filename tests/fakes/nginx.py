"""A real nginx between two of those that a test has."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from benchmarks.children import last_words, spawn
from gollama_proxy.machine import find_free_ports
from tests.fakes.tools import require
from tests.fakes.waiting import until

# A minimal configuration, with `proxy_pass` and no more: HTTP/1.0 towards the
# upstream, a connection for each request, and answers that are buffered.
PLAIN = ""
# What is recommended for streams: kept connections, and nothing is held back, neither
# of an answer nor of a request.
STREAMING = """
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_buffering off;
    proxy_request_buffering off;
"""
_CONFIGURATION = """
    daemon off;
    master_process off;
    pid {folder}/nginx.pid;
    error_log {folder}/errors.log warn;
    events {{ worker_connections 1024; }}
    http {{
        access_log off;
        client_body_temp_path {folder}/body;
        proxy_temp_path {folder}/proxy;
        fastcgi_temp_path {folder}/fastcgi;
        scgi_temp_path {folder}/scgi;
        uwsgi_temp_path {folder}/uwsgi;
        # A client that waits for the rest of something odd must not wait for long.
        client_header_timeout 2s;
        client_body_timeout 2s;
        keepalive_timeout 2s;
        upstream upstream {{
            server 127.0.0.1:{upstream} max_fails=0;
            keepalive 8;
        }}
        server {{
            listen 127.0.0.1:{port};
            location / {{
                proxy_pass http://upstream;
                {directives}
            }}
        }}
    }}
"""


@contextlib.asynccontextmanager
async def running_nginx(
    upstream: int, folder: Path, directives: str = PLAIN
) -> AsyncIterator[int]:
    """Run nginx in front of a port; yields its own.  It keeps its files in `folder`."""
    program = require("nginx", package="nginx-light")
    [port] = find_free_ports(1)
    configuration = folder / "nginx.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            folder=folder, port=port, upstream=upstream, directives=directives
        )
    )
    errors = folder / "errors.log"
    command = [program, "-p", str(folder), "-c", str(configuration), "-e", str(errors)]
    async with spawn(command, folder / "stderr.log") as child:
        process = child.process
        await until(lambda: process.returncode is not None or _accepts(port))
        assert process.returncode is None, last_words(errors)
        yield port


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

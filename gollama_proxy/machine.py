"""What a worker's machine has: graphics cards, memory, addresses, a server's command.

Each source has a reader, which fetches text, and a parser, which is a pure function of
that text.  The first source that knows a card is used: cards of two makers in one
machine are rare, and an integrated one beside a real card is not used for models.

Sources: nvidia-smi(1); Documentation/gpu/amdgpu/driver-misc.rst of Linux; `rocm-smi
--json` of ROCm 5 and 6; sysctl(8) and vm_stat(1) of macOS; proc_meminfo(5).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import re
import shutil
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gollama_proxy.config import addresses
from gollama_proxy.config.values import ConfigError

GIB = 1 << 30
# A driver that hangs must not keep an agent from renewing its lease.
TIMEOUT = 5.0
CONNECT_TIMEOUT = 3.0  # seconds, to a helper with a part of the model
USUAL_PORT = 8080  # of llama-server
# Below those that systems give to programs that ask for any port.
_LOWER_PORTS = range(20_000, 32_768)


@dataclass(frozen=True, slots=True)
class Device:
    """A graphics card, or the memory of a machine without one; None: not known."""

    name: str
    memory_gib: float | None = None
    used_gib: float | None = None
    busy: float | None = None  # 0 to 1
    celsius: float | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found; `graphics` is False if the devices are ordinary memory."""

    devices: tuple[Device, ...] = ()
    graphics: bool = False

    @property
    def vram_gib(self) -> float | None:
        """The memory that models can use on graphics cards, in GiB."""
        sizes = [each.memory_gib for each in self.devices if each.memory_gib]
        return round(sum(sizes), 2) if self.graphics and sizes else None

    def report(self) -> list[dict[str, Any]]:
        """Return the devices as an agent reports them, without what is not known."""
        return [
            {key: value for key, value in asdict(each).items() if value is not None}
            for each in self.devices
        ]


async def examine() -> Machine:
    """Look at this machine; never raises, and takes `TIMEOUT` at most per source."""
    if sys.platform == "darwin":
        names = ("hw.memsize", "machdep.cpu.brand_string", "iogpu.wired_limit_mb")
        sysctl = await _output("sysctl", *names)
        apple = parse_apple(sysctl, await _output("vm_stat"))
        return Machine(apple, graphics=True) if apple else Machine()
    for found in (
        parse_nvidia(await _output("nvidia-smi", *_NVIDIA)),
        await asyncio.to_thread(_read_amdgpu),
        parse_rocm(await _output("rocm-smi", *_ROCM)),
    ):
        if found:
            return Machine(found, graphics=True)
    return Machine(await asyncio.to_thread(_read_memory))


def load() -> float | None:
    """Return how many processes want each processor, over the last minute."""
    try:
        return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)
    except OSError:
        return None


def mac_of(address: str) -> str:
    """Return the hardware address of the network card with an IP address; "" if none.

    Only on Linux, where a card can be asked for its address.
    """
    for card in sorted(Path("/sys/class/net").glob("*")):
        try:
            mac = (card / "address").read_text().strip()
        except OSError:
            continue
        if re.fullmatch("(?!(00:){5})[0-9a-f:]{17}", mac) and address in (
            _address_of(card.name),
            *_addresses6_of(card.name),
        ):
            return mac
    return ""


def _address_of(card: str) -> str:
    """Return the IPv4 address of a network card (netdevice(7), SIOCGIFADDR)."""
    import fcntl

    request = card.encode()[:15].ljust(256, b"\0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            found = fcntl.ioctl(sock.fileno(), 0x8915, request)
        except OSError:
            return ""
    return socket.inet_ntoa(found[20:24])


def _addresses6_of(card: str) -> list[str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    rows = [line.split() for line in lines]
    return [
        socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0]))
        for row in rows
        if len(row) == 6 and row[5] == card
    ]


def host_name() -> str:
    """Return the first part of this machine's name, without odd characters."""
    short = socket.gethostname().partition(".")[0]
    return re.sub(r"[^\w-]", "-", short, flags=re.ASCII) or "worker"


async def _output(program: str, *arguments: str) -> str:
    """Return what a program writes; "" if it is missing, fails or hangs."""
    found = await asyncio.to_thread(shutil.which, program)
    if found is None:
        return ""
    try:
        process = await asyncio.create_subprocess_exec(
            *(found, *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return ""
    try:
        async with asyncio.timeout(TIMEOUT):
            output, _ = await process.communicate()
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    # `sysctl` fails for one unknown name, and answers for the others.
    return output.decode(errors="replace")


# --- NVIDIA -----------------------------------------------------------------------

_NVIDIA = (
    "--query-gpu=name,memory.total,memory.used,utilization.gpu,temperature.gpu",
    "--format=csv,noheader,nounits",
)


def parse_nvidia(text: str) -> tuple[Device, ...]:
    """Read the output of nvidia-smi for `_NVIDIA`: one card in each line, in MiB."""
    devices = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.rsplit(",", 4)]
        if len(cells) != 5:
            continue  # such as "No devices were found"
        name, *numbers = cells
        total, used, busy, celsius = map(_number, numbers)
        devices.append(
            Device(
                name, _gib(total, 1 << 20), _gib(used, 1 << 20), _share(busy), celsius
            )
        )
    return tuple(devices)


# --- AMD --------------------------------------------------------------------------

_ROCM = (
    *("--showproductname", "--showmeminfo", "vram"),
    *("--showuse", "--showtemp", "--json"),
)
_AMD = "0x1002"
# An integrated graphics unit has a small part of the memory as its own, and uses the
# rest through its translation table (GTT).
_INTEGRATED_BELOW = 2 * GIB


def parse_amdgpu(files: Mapping[str, str]) -> Device | None:
    """Read the files of one card in sysfs, by name; None if it is not AMD's."""
    if files.get("vendor", "").strip() != _AMD:
        return None
    total = _number(files.get("mem_info_vram_total"))
    used = _number(files.get("mem_info_vram_used"))
    if total is None:
        return None
    if total < _INTEGRATED_BELOW:
        total += _number(files.get("mem_info_gtt_total")) or 0.0
        used = (used or 0.0) + (_number(files.get("mem_info_gtt_used")) or 0.0)
    millis = _number(files.get("temp1_input"))
    return Device(
        files.get("product_name", "").strip() or "AMD graphics",
        _gib(total),
        _gib(used),
        _share(_number(files.get("gpu_busy_percent"))),
        None if millis is None else millis / 1000,
    )


def _read_amdgpu(base: Path = Path("/sys/class/drm")) -> tuple[Device, ...]:
    cards = (card for card in base.glob("card*") if card.name[4:].isdigit())
    found = []
    for card in sorted(cards, key=lambda card: int(card.name[4:])):
        folder = card / "device"
        names = [folder / "vendor", folder / "product_name"]
        names += [folder / "gpu_busy_percent", *folder.glob("mem_info_*")]
        names += folder.glob("hwmon/hwmon*/temp1_input")
        if (device := parse_amdgpu(_contents(names))) is not None:
            found.append(device)
    return tuple(found)


def parse_rocm(text: str) -> tuple[Device, ...]:
    """Read the output of rocm-smi for `_ROCM`: an object with one key for each card."""
    try:
        cards = json.loads(text)
    except ValueError:
        return ()
    if not isinstance(cards, dict):
        return ()
    devices = []
    for key, card in cards.items():
        if not re.fullmatch(r"card\d+", key) or not isinstance(card, dict):
            continue
        values = {str(name).lower(): str(value) for name, value in card.items()}
        total = _number(values.get("vram total memory (b)"))
        if total is None:
            continue
        temperatures = (
            _number(v) for name, v in values.items() if "temperature" in name
        )
        devices.append(
            Device(
                values.get("card series") or values.get("card model") or "AMD graphics",
                _gib(total),
                _gib(_number(values.get("vram total used memory (b)"))),
                _share(_number(values.get("gpu use (%)"))),
                max((t for t in temperatures if t is not None), default=None),
            )
        )
    return tuple(devices)


# --- Apple ------------------------------------------------------------------------


def parse_apple(sysctl: str, vm_stat: str) -> tuple[Device, ...]:
    """Read the memory that the graphics unit of a Mac may use; () on an Intel Mac.

    Without a limit of the user's, macOS lets it have two thirds of a small memory, and
    three quarters of one above 36 GiB.
    """
    values = dict(re.findall(r"^([\w.]+): (.*)$", sysctl, re.MULTILINE))
    size, name = (
        _number(values.get("hw.memsize")),
        values.get("machdep.cpu.brand_string"),
    )
    if size is None or name is None or not name.startswith("Apple"):
        return ()
    limit = (_number(values.get("iogpu.wired_limit_mb")) or 0.0) * (1 << 20)
    usable = limit or (size * 3 / 4 if size > 36 * GIB else size * 2 / 3)
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    counts = dict(re.findall(r'^"?([\w -]+)"?:\s+(\d+)\.?$', vm_stat, re.MULTILINE))
    used = None
    if page is not None:
        names = ("Pages active", "Pages wired down", "Pages occupied by compressor")
        used = sum(int(counts.get(name, 0)) for name in names) * int(page[1])
    return (Device(name, _gib(usable), _gib(used)),)


# --- Machines without a graphics card ---------------------------------------------


def parse_meminfo(text: str, celsius: float | None = None) -> tuple[Device, ...]:
    """Read /proc/meminfo."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    total, free = (_number(values.get(key)) for key in ("MemTotal", "MemAvailable"))
    if total is None:
        return ()
    used = None if free is None else total - free
    return (Device("memory", _gib(total, 1024), _gib(used, 1024), None, celsius),)


_PROCESSOR = re.compile(r"x86_pkg_temp|cpu[-_]?thermal|k10temp|coretemp|soc[-_]thermal")


def parse_thermal(zones: Iterable[tuple[str, str]]) -> float | None:
    """Read the types and temperatures of zones; return the processor's, in Celsius."""
    values = (
        _number(value)
        for kind, value in zones
        if _PROCESSOR.fullmatch(kind.strip().lower())
    )
    return max((v / 1000 for v in values if v is not None), default=None)


def _read_memory() -> tuple[Device, ...]:
    zones = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*"):
        files = _contents([zone / "type", zone / "temp"])
        zones.append((files.get("type", ""), files.get("temp", "")))
    text = _contents([Path("/proc/meminfo")]).get("meminfo", "")
    if found := parse_meminfo(text, parse_thermal(zones)):
        return found
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return ()
    return (Device("memory", _gib(float(size))),)


def _contents(files: Sequence[Path]) -> dict[str, str]:
    """Read small files that may not exist, or may not be read now."""
    contents = {}
    for file in files:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            contents[file.name] = file.read_text()
    return contents


# --- Numbers ----------------------------------------------------------------------


def _number(text: str | None) -> float | None:
    """Read a number; None for what is missing, such as `[N/A]`, or is negative."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < 1e18 else None


def _gib(value: float | None, unit: int = 1) -> float | None:
    return None if value is None else round(value * unit / GIB, 3)


def _share(percent: float | None) -> float | None:
    return None if percent is None else min(percent / 100, 1.0)


# --- Addresses --------------------------------------------------------------------


def place(url: str, local: str) -> str:
    """Return the URL under which a hub reaches a worker.

    `local` is this machine's address on the way to that hub; it takes the place of
    loopback, and of an address that means all of them.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    address = addresses.parse(host)
    if not addresses.is_loopback(host) and not (address and address.is_unspecified):
        return url
    host = f"[{local}]" if ":" in local else local
    return parts._replace(netloc=f"{host}:{parts.port}").geturl()


async def address_towards(hub: str) -> str:
    """Return the address of this machine on the way to a hub; nothing is sent.

    Raises:
        OSError: the name does not resolve, or there is no way to it.
    """
    parts = urlsplit(hub)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)
    failure = OSError("there is no way to it")
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)
            except OSError as exc:
                failure = exc
            else:
                return str(probe.getsockname()[0])
    raise failure


def listen(port: int) -> socket.socket:
    """Listen on all addresses, IPv6 too where there is any."""
    with contextlib.suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True
            )
    return socket.create_server(("", port))


def find_free_ports(count: int) -> list[int]:
    """Find distinct free ports of this machine.

    They are likely to be free still when they are used: no system gives them to a
    program that asks for any port.

    Raises:
        OSError: there are not as many.
    """
    ports: list[int] = []
    for port in random.sample(_LOWER_PORTS, len(_LOWER_PORTS)):
        if len(ports) == count:
            return ports
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


# --- Where its server listens -----------------------------------------------------


def flag_in(
    command: Sequence[str], flag: str, variable: str, environ: Mapping[str, str]
) -> str | None:
    """Return the value of a server's flag: the last one given, else of a variable."""
    value = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return environ.get(variable) if value is None else value


def _usable_port(found: str | None) -> int:
    """Return the port of a command, or a free one for it: the usual one, if it is.

    Raises:
        ConfigError: it is not a port.
    """
    if found is not None:
        if not re.fullmatch(r"[0-9]{1,5}", found) or not 1 <= int(found) <= 65_535:
            text = "must be a whole number from 1 to 65535"
            raise ConfigError(f"--exec: --port {found}: {text}")
        return int(found)
    for port in (USUAL_PORT, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise ConfigError("--exec: no port of this machine is free")


def listening(
    command: Sequence[str], environ: Mapping[str, str]
) -> tuple[list[str], str]:
    """Return a server's command, with a port if it had none, and the URL it serves.

    Raises:
        ConfigError: a hub cannot use its port or host.
    """
    found = flag_in(command, "--port", "LLAMA_ARG_PORT", environ)
    port = _usable_port(found)
    added = ["--port", str(port)] if found is None else []
    host = flag_in(command, "--host", "LLAMA_ARG_HOST", environ) or "127.0.0.1"
    if host.startswith("/") or host.endswith(".sock"):
        raise ConfigError(f"--exec: --host {host}: a hub cannot reach a socket file")
    host = f"[{host}]" if ":" in host else host
    return [*command, *added], f"http://{host}:{port}"


def rpc_helpers(
    command: Sequence[str], environ: Mapping[str, str]
) -> tuple[tuple[str, int], ...]:
    """Return the hosts and ports in `--rpc` of a llama-server's command.

    Empty for another program: the addresses may be those of its container.

    Raises:
        ConfigError: one of them is not an address with a port.
    """
    if not Path(command[0]).name.startswith("llama"):
        return ()
    given = flag_in(command, "--rpc", "LLAMA_ARG_RPC", environ) or ""
    helpers = []
    for place in filter(None, given.split(",")):
        host, _, port = place.strip().rpartition(":")
        if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65_535:
            text = "must be a host and a port, such as 10.0.0.12:50052"
            raise ConfigError(f"--exec: --rpc {place}: {text}")
        helpers.append((host, int(port)))
    return tuple(helpers)


async def unreachable(helpers: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Return those of the helpers that accept no connection."""

    async def is_reachable(host: str, port: int) -> bool:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, writer = await asyncio.open_connection(host, port)
        except (OSError, UnicodeError):  # the latter for a name that cannot be one
            return False
        writer.close()
        return True

    found = await asyncio.gather(*(is_reachable(*each) for each in helpers))
    return tuple(
        f"{host}:{port}"
        for (host, port), good in zip(helpers, found, strict=True)
        if not good
    )


def with_port(url: str) -> str:
    """Add the port of llama-server to a URL without one."""
    parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
    if parts.port is None:
        port = 443 if parts.scheme == "https" else USUAL_PORT
        parts = parts._replace(netloc=f"{parts.netloc}:{port}")
    return parts.geturl()

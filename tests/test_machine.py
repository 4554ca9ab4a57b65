"""What an agent finds out about its machine, from recorded output."""

from __future__ import annotations

import re
import socket

import ifaddr
import pytest

from gollama_proxy import machine
from gollama_proxy.config.values import ConfigError
from gollama_proxy.machine import Device, Machine

NVIDIA = """\
NVIDIA GeForce RTX 3090, 24576, 18211, 97, 71
NVIDIA GeForce RTX 3060, 12288, 3, 0, 38
"""
# A DGX Spark: one memory for all, of which the driver reports no size.
SPARK = "NVIDIA GB10, [N/A], [N/A], 3, 41\n"
ROCM = """{
 "card0": {"Temperature (Sensor edge) (C)": "41.0",
  "Temperature (Sensor junction) (C)": "44.0", "GPU use (%)": "7",
  "VRAM Total Memory (B)": "25753026560", "VRAM Total Used Memory (B)": "27119616",
  "Card Series": "Radeon RX 7900 XTX", "Card Model": "0x744c",
  "Card Vendor": "Advanced Micro Devices, Inc. [AMD/ATI]"},
 "system": {"Driver version": "6.8.5"}
}"""
AMDGPU = {
    "vendor": "0x1002\n",
    "mem_info_vram_total": "17163091968\n",
    "mem_info_vram_used": "1073741824\n",
    "mem_info_gtt_total": "16729300992\n",
    "mem_info_gtt_used": "41943040\n",
    "gpu_busy_percent": "42\n",
    "temp1_input": "53000\n",
}
SYSCTL = """\
hw.memsize: 68719476736
machdep.cpu.brand_string: Apple M2 Max
iogpu.wired_limit_mb: 0
"""
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              1834821.
Pages active:                             524288.
Pages inactive:                           511002.
Pages speculative:                          1441.
Pages throttled:                               0.
Pages wired down:                         131072.
Pages purgeable:                            3410.
"Translation faults":                  302150911.
Pages occupied by compressor:              65536.
"""
MEMINFO = """\
MemTotal:       16777216 kB
MemFree:         1048576 kB
MemAvailable:    8388608 kB
HugePages_Total:       0
"""


def test_nvidia_cards() -> None:
    assert machine.parse_nvidia(NVIDIA) == (
        Device("NVIDIA GeForce RTX 3090", 24.0, 17.784, 0.97, 71.0),
        Device("NVIDIA GeForce RTX 3060", 12.0, 0.003, 0.0, 38.0),
    )
    assert machine.parse_nvidia(SPARK) == (Device("NVIDIA GB10", None, None, 0.03, 41),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No devices were found\n",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
    ],
)
def test_no_nvidia_card(text: str) -> None:
    assert machine.parse_nvidia(text) == ()


def test_amd_cards_of_rocm() -> None:
    (card,) = machine.parse_rocm(ROCM)
    assert card == Device("Radeon RX 7900 XTX", 23.984, 0.025, 0.07, 44.0)


@pytest.mark.parametrize("text", ["", "WARNING: no GPU", "[]", '{"card0": 3}', "{}"])
def test_no_amd_card_of_rocm(text: str) -> None:
    assert machine.parse_rocm(text) == ()


def test_an_amd_card_in_sysfs() -> None:
    expected = Device("AMD graphics", 15.984, 1.0, 0.42, 53.0)
    assert machine.parse_amdgpu(AMDGPU) == expected
    named = AMDGPU | {"product_name": "Radeon Pro W7900\n", "temp1_input": "?"}
    found = machine.parse_amdgpu(named)
    assert found is not None
    assert (found.name, found.celsius) == ("Radeon Pro W7900", None)


def test_an_integrated_unit_uses_the_memory_of_its_machine() -> None:
    found = machine.parse_amdgpu(AMDGPU | {"mem_info_vram_total": "536870912"})
    assert found is not None
    assert found.memory_gib == round(0.5 + 16729300992 / (1 << 30), 3)


@pytest.mark.parametrize(
    "files", [{}, {"vendor": "0x8086"}, {"vendor": "0x1002"}, AMDGPU | {"vendor": "x"}]
)
def test_no_amd_card_in_sysfs(files: dict[str, str]) -> None:
    assert machine.parse_amdgpu(files) is None


def test_the_memory_of_a_mac() -> None:
    (found,) = machine.parse_apple(SYSCTL, VM_STAT)
    assert found == Device("Apple M2 Max", 48.0, 11.0)
    small = SYSCTL.replace("68719476736", "17179869184")
    (found,) = machine.parse_apple(small, "")
    assert found == Device("Apple M2 Max", 10.667)
    (found,) = machine.parse_apple(SYSCTL.replace("_mb: 0", "_mb: 57344"), VM_STAT)
    assert found.memory_gib == 56.0


def test_a_mac_without_memory_of_that_kind() -> None:
    intel = SYSCTL.replace("Apple M2 Max", "Intel(R) Core(TM) i7")
    assert machine.parse_apple(intel, VM_STAT) == ()
    assert machine.parse_apple("", "") == ()


def test_a_machine_without_a_card() -> None:
    assert machine.parse_meminfo(MEMINFO, 48.5) == (
        Device("memory", 16.0, 8.0, None, 48.5),
    )
    assert machine.parse_meminfo("") == ()


def test_the_temperature_is_that_of_the_processor() -> None:
    zones = [("acpitz", "99000"), ("x86_pkg_temp\n", "48500\n"), ("k10temp", "bad")]
    assert machine.parse_thermal(zones) == 48.5
    assert machine.parse_thermal([("acpitz", "27800")]) is None


def test_only_the_memory_of_graphics_is_offered_to_models() -> None:
    cards = (Device("a", 24.0), Device("b", 12.0), Device("c"))
    assert Machine(cards, graphics=True).vram_gib == 36.0
    assert Machine(cards).vram_gib is None
    assert Machine((Device("a"),), graphics=True).vram_gib is None
    assert Machine(cards[2:], graphics=True).report() == [{"name": "c"}]


async def test_this_machine_can_be_examined() -> None:
    found = await machine.examine()
    assert found.devices
    assert all(device.memory_gib for device in found.devices if not found.graphics)
    load = machine.load()
    assert load is None or load >= 0
    assert machine.host_name()


def test_a_card_is_found_by_its_address() -> None:
    """Only real cards have a hardware address, and loopback is none."""
    assert machine.mac_of("127.0.0.1") == ""
    assert machine.mac_of("::1") == ""
    assert machine.mac_of("192.0.2.255") == ""
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            found = machine.mac_of(ip.ip if isinstance(ip.ip, str) else ip.ip[0])
            assert re.fullmatch("([0-9a-f]{2}:){5}[0-9a-f]{2}|", found)


# --- Addresses --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "local", "expected"),
    [
        ("http://127.0.0.1:8080", "10.0.0.5", "http://10.0.0.5:8080"),
        ("http://localhost:8080/x", "10.0.0.5", "http://10.0.0.5:8080/x"),
        ("http://0.0.0.0:8080", "10.0.0.5", "http://10.0.0.5:8080"),
        ("http://[::]:8080", "10.0.0.5", "http://10.0.0.5:8080"),
        ("http://[::1]:8080", "fd00::5", "http://[fd00::5]:8080"),
        ("http://10.0.0.7:8080", "10.0.0.5", "http://10.0.0.7:8080"),
        ("https://desk.lan:443", "10.0.0.5", "https://desk.lan:443"),
        ("http://127.0.0.1:8080", "127.0.0.1", "http://127.0.0.1:8080"),
    ],
)
def test_a_hub_gets_an_address_that_it_can_reach(
    url: str, local: str, expected: str
) -> None:
    assert machine.place(url, local) == expected


@pytest.mark.parametrize(
    ("flags", "environ", "url"),
    [
        (["--port", "9000"], {}, "http://127.0.0.1:9000"),
        (["--port=9000", "--host", "0.0.0.0"], {}, "http://0.0.0.0:9000"),
        (["--port", "1", "--port", "2"], {}, "http://127.0.0.1:2"),
        (["--host=::", "--port", "9000"], {}, "http://[::]:9000"),
        ([], {"LLAMA_ARG_PORT": "9000"}, "http://127.0.0.1:9000"),
        (["--port", "9001"], {"LLAMA_ARG_PORT": "9000"}, "http://127.0.0.1:9001"),
        (
            ["--port", "9001"],
            {"LLAMA_ARG_HOST": "10.0.0.5"},
            "http://10.0.0.5:9001",
        ),
    ],
)
def test_a_command_has_its_own_port(
    flags: list[str], environ: dict[str, str], url: str
) -> None:
    command = ["llama-server", *flags]
    assert machine.listening(command, environ) == (command, url)


def test_a_command_without_a_port_gets_one() -> None:
    command, url = machine.listening(["llama-server", "-m", "x"], {})
    assert command[:4] == ["llama-server", "-m", "x", "--port"]
    assert url == f"http://127.0.0.1:{command[4]}"
    assert 1024 <= int(command[4]) <= 65_535


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--port", "x"], "--port x: must be a whole number"),
        (["--port"], "--port : must be a whole number"),
        (["--port", "0"], "--port 0: must be"),
        (["--port", "65536"], "--port 65536: must be"),
        (["--port", "1", "--host", "/run/machine.sock"], "a socket file"),
    ],
)
def test_a_command_that_no_hub_can_reach(flags: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        machine.listening(["llama-server", *flags], {})


@pytest.mark.parametrize(
    ("command", "environ", "helpers"),
    [
        (["llama-server"], {}, ()),
        (["llama-server", "--rpc", ""], {}, ()),
        (["/opt/llama-server", "--rpc", "a:1,b.lan:2"], {}, (("a", 1), ("b.lan", 2))),
        (["llama-server", "--rpc=10.0.0.12:50052"], {}, (("10.0.0.12", 50052),)),
        (["llama-server"], {"LLAMA_ARG_RPC": "a:1"}, (("a", 1),)),
        # The names are those of another network, or of another program.
        (["docker", "run", "image", "--rpc", "a:1"], {}, ()),
    ],
)
def test_the_helpers_of_a_server_are_those_of_its_command(
    command: list[str], environ: dict[str, str], helpers: tuple[tuple[str, int], ...]
) -> None:
    assert machine.rpc_helpers(command, environ) == helpers


@pytest.mark.parametrize("given", ["a", ":1", "a:", "a:x", "a:65536", "a:1,b"])
def test_a_helper_without_a_port_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--rpc \S+: must be a host and a port"):
        machine.rpc_helpers(["llama-server", "--rpc", given], {})


async def test_a_helper_is_reachable_if_it_accepts_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as up, socket.socket() as down:
        down.bind(("127.0.0.1", 0))  # and nothing listens there
        there, missing = up.getsockname(), down.getsockname()
        assert await machine.unreachable([there]) == ()
        place = f"127.0.0.1:{missing[1]}"
        assert await machine.unreachable([there, missing]) == (place,)
        assert await machine.unreachable([("a..b", 1)]) == ("a..b:1",)


def test_free_ports_differ() -> None:
    ports = machine.find_free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_free_ports_are_not_given_to_programs_that_ask_for_any() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert max(machine.find_free_ports(50)) < other.getsockname()[1]


def test_there_may_be_no_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(machine, "_LOWER_PORTS", range(port, port + 1))
        with pytest.raises(OSError, match="in use"):
            machine.find_free_ports(1)

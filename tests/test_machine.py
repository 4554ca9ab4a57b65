"""What an agent finds out about its machine, from recorded output."""

from __future__ import annotations

import re

import ifaddr
import pytest

from gollama_proxy import machine
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

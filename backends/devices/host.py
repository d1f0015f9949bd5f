"""What this machine has of NVIDIA's cards, as files of the system tell: no library, which may be what doesn't work."""

import re
from dataclasses import dataclass
from pathlib import Path

NVIDIA = "0x10de"  # Its number among the makers of PCI devices.
_DISPLAY = "0x03"  # How the PCI class of a display controller begins, with or without a connector.
_VERSION = re.compile(r"\b[0-9]{3,}\.[0-9]+(?:\.[0-9]+)?\b")


@dataclass(frozen=True, slots=True)
class Host:
    """driver: version of the loaded kernel module, as "535.183.01". nodes: device files of the cards.

    is_wsl: Windows' driver serves this Linux, which has none of these files then. has_memory_node: the file is there
    by which CUDA maps memory.
    """

    has_card: bool
    driver: str | None
    names: tuple[str, ...]
    nodes: tuple[Path, ...]
    has_memory_node: bool
    is_wsl: bool


def look(root: Path = Path("/")) -> Host:
    """What is there. A card without any driver shows on the bus alone; in a container the bus is that of the host."""
    driver = root / "proc/driver/nvidia"
    version = _VERSION.search(_first_line(driver / "version"))
    nodes = tuple(sorted((root / "dev").glob("nvidia[0-9]*")))
    is_wsl = (root / "dev/dxg").exists() and (root / "usr/lib/wsl/lib/libcuda.so.1").exists()
    on_bus = any(_is_card(device) for device in (root / "sys/bus/pci/devices").glob("*"))
    return Host(
        has_card=on_bus or bool(nodes) or version is not None or is_wsl,
        driver=version and version[0],
        names=tuple(filter(None, (_model(path) for path in sorted((driver / "gpus").glob("*/information"))))),
        nodes=nodes,
        has_memory_node=(root / "dev/nvidia-uvm").exists(),
        is_wsl=is_wsl,
    )


def _is_card(device: Path) -> bool:
    return _first_line(device / "vendor") == NVIDIA and _first_line(device / "class").startswith(_DISPLAY)


def _model(path: Path) -> str:
    """The card's name of a text whose lines are as "Model: \t\t NVIDIA GeForce RTX 3090"."""
    found = re.search(r"^Model:\s*(.*)$", _text(path), re.MULTILINE)
    return found[1].strip() if found else ""


def _first_line(path: Path) -> str:
    return _text(path).partition("\n")[0].strip()


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""

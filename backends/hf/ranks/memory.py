"""What a rank has held of its device's memory."""

from pathlib import Path

import torch


def peak_bytes(device: torch.device) -> int:
    """The most so far, in bytes: of a card what torch took of it, else this process' resident memory; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 0

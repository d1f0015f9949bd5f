"""`tightrope plan`: what a model needs and the largest context that fits, from headers alone."""

import json
import re
from typing import TYPE_CHECKING

from tightrope.backends.errors import BackendError
from tightrope.backends.settings import MAX_CARDS, ModelSettings
from tightrope.engine.console import printable
from tightrope.server.cli.failures import CommandFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tightrope.backends.planning import DeviceShare, Outline

SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[KMGT]?)i?B?", re.IGNORECASE)
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
BAR = 40  # Characters of a device's bar.
LEAST_MEMORY, MOST_MEMORY = 1 << 20, 1 << 50  # Anything below a megabyte or above a petabyte is a slip.


def parse_size(text: str, option: str = "--memory") -> int:
    """Bytes of a size such as 24GiB, 24G or 512MB; units are powers of 1024. Raises UsageError, naming the option."""
    match = SIZE.fullmatch(text.strip())
    size = int(float(match["number"]) * UNITS[match["unit"].upper()]) if match and len(text) < 32 else 0
    if not LEAST_MEMORY <= size <= MOST_MEMORY:
        raise UsageError(f"{option}: should be a size from 1MiB to 1024TiB, such as 24GiB, not {text!r:.40}")
    return size


def parse_sizes(text: str, option: str) -> tuple[int, ...]:
    """Sizes with commas between: one for each card. Raises UsageError."""
    parts = text.split(",")
    if len(parts) > MAX_CARDS:
        raise UsageError(f"{option}: at most {MAX_CARDS} cards can be planned for, not {len(parts)}")
    return tuple(parse_size(part, option) for part in parts)


def device_sizes(devices: str | None, device_memory: str | None) -> tuple[int, ...] | None:
    """Sizes of the cards that one of the two options names; None where neither does. Raises UsageError."""
    if devices is not None and device_memory is not None:
        raise UsageError("--devices and --device-memory mean the same; give only one of them")
    if devices is not None:
        return parse_sizes(devices, "--devices")
    return None if device_memory is None else parse_sizes(device_memory, "--device-memory")


def plan(
    settings: ModelSettings, memory_bytes: int | None, device_bytes: tuple[int, ...] | None, *, as_json: bool
) -> int:
    """Print the plan; return the exit status. Raises CommandFailed, after printing, if it does not fit."""
    # Their reads load the libraries that a model's format needs.
    from tightrope.backends.detect import outline
    from tightrope.backends.embedding.opening import footprints, taken_bytes
    from tightrope.backends.memory import usable_memory

    try:
        beside = footprints(settings)
        left = memory_bytes
        if beside:
            left = max(0, (usable_memory(settings) if memory_bytes is None else memory_bytes) - taken_bytes(beside))
        found = outline(settings, left, device_bytes)
    except BackendError as error:
        raise CommandFailed(str(error)) from None
    taken = taken_bytes(beside)
    is_given = memory_bytes is not None or settings.max_memory_mib is not None
    if as_json:
        print(json.dumps(to_json(found) | {"embedding_bytes": taken}, indent=2))
    else:
        lines = to_lines(found, is_given, device_bytes is not None)
        names = ", ".join(f"{one.path.name} ({one.kind})" for one in beside)
        more = [f"beside     {_size(taken)} of the machine's memory for {names}"] if beside else []
        print("\n".join(map(printable, [*lines[:2], *more, *lines[2:]])))
    if found.refusal is not None:
        raise CommandFailed(found.refusal)
    return 0


def to_lines(found: "Outline", is_host_given: bool, is_card_given: bool) -> list[str]:
    """The plan as people read it. is_host_given, is_card_given: that memory was named, not measured."""
    if found.device == "cpu":
        memory = "" if is_host_given else ", nine tenths of what is free"
    else:
        where = "the cards" if len(found.shares) > 1 else "the card"
        memory = f" on {where}, all that is {'named' if is_card_given else 'free'} but for a reserve"
    beside = f", and {_size(found.host_bytes)} in the machine's own memory" if found.host_bytes else ""
    lines = [
        f"model      {found.path.name} ({found.architecture}, {found.format})",
        f"memory     {_size(found.memory_bytes)}{memory}",
        f"weights    {_size(found.weight_bytes)}{beside}",
        f"workspace  {_size(found.workspace_bytes)} at most{_steps(found)}",
        *_process_lines(found),
        "",
        f"cache   a token     largest context   {found.window} tokens",
    ]
    for cache in found.caches:
        size = _size(cache.window_bytes)
        verdict = f"fit in {size}" if cache.fitting >= found.window else f"would take {size}"
        lines.append(f"{cache.name:5} {cache.token_bytes / 1024:7.1f} KiB  {cache.fitting:>15}   {verdict}")
    if found.shares:
        lines += ["", *_device_lines(found.shares)]
    if found.chosen is not None:
        lines += ["", f"serve would keep {found.chosen.cache_tokens} tokens as {found.chosen.cache}:"]
        lines += [f"  {note}" for note in found.chosen.notes]
    return lines


def _process_lines(found: "Outline") -> list[str]:
    """What ranks take beside the first one, whose process everyone has."""
    if not found.process_bytes:
        return []
    which = f"of ranks 1 to {len(found.shares) - 1}, without the model"
    return [f"processes  {_size(found.process_bytes)} of the machine's own memory, {which}"]


def _device_lines(shares: "Sequence[DeviceShare]") -> list[str]:
    """A line for each device, with what it holds, and a bar of its memory: w for weights, c for cache, s for steps."""
    width = max(len("device"), *(len(share.device) for share in shares))
    lines = [f"{'device':{width}}   weights     cache  workspace  of memory"]
    for share in shares:
        sizes = share.weight_bytes, share.cache_bytes, share.workspace_bytes
        ends = [round(BAR * min(1.0, sum(sizes[: n + 1]) / max(1, share.memory_bytes))) for n in range(3)]
        bar = "w" * ends[0] + "c" * (ends[1] - ends[0]) + "s" * (ends[2] - ends[1])
        layers = "" if share.layers is None else f"  {share.layers} layers"
        held = "  ".join((_gib(sizes[0]), _gib(sizes[1]), f" {_gib(sizes[2])}", f"{_gib(share.memory_bytes)} GiB"))
        lines.append(f"{share.device:{width}}  {held}  |{bar:.<{BAR}}|{layers}")
    return lines


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):8.2f}"


def _steps(found: "Outline") -> str:
    return "" if found.chosen is None else f", for steps of {found.chosen.step_tokens} tokens"


def to_json(found: "Outline") -> dict[str, object]:
    """The plan as one flat object, documented in docs/plan.md; sizes in bytes and tokens."""
    chosen = found.chosen
    flat: dict[str, object] = {
        "model": str(found.path),
        "architecture": found.architecture,
        "format": found.format,
        "device": found.device,
        "memory_bytes": found.memory_bytes,
        "weight_bytes": found.weight_bytes,
        "host_bytes": found.host_bytes,
        "workspace_bytes": found.workspace_bytes,
        "process_bytes": found.process_bytes,
        "trained_len": found.trained_len,
        "window": found.window,
        "fits": chosen is not None,
        "refusal": found.refusal,
        "serve_cache": chosen and chosen.cache,
        "serve_cache_tokens": chosen and chosen.cache_tokens,
        "serve_cache_bytes": chosen and chosen.cache_bytes,
        "serve_step_tokens": chosen and chosen.step_tokens,
        "serve_notes": list(chosen.notes) if chosen else [],
    }
    for name in ("device", "memory_bytes", "weight_bytes", "cache_bytes", "workspace_bytes", "layers"):
        key = "devices" if name == "device" else f"device_{name}"
        flat[key] = [getattr(share, name) for share in found.shares]
    for cache in found.caches:
        flat[f"{cache.name}_bytes_per_token"] = cache.token_bytes
        flat[f"{cache.name}_bytes_for_window"] = cache.window_bytes
        flat[f"{cache.name}_largest_context"] = cache.fitting
    return flat


def _size(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"

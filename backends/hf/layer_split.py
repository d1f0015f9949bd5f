"""Memory of several devices that a model's layers lie on in a row: the machine's own, perhaps, and then cards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from tightrope.backends.allocator import LARGE_ROUND, held_bytes
from tightrope.backends.errors import DoesNotFit
from tightrope.backends.files.hf_config import ModelShape
from tightrope.backends.hf.cache.window_pages import KEPT_WINDOWS, most_needed
from tightrope.backends.hf.host_workspace import HostWorkspace
from tightrope.backends.hf.load.arena import arena_bytes
from tightrope.backends.hf.load.blueprint import Blueprint
from tightrope.backends.hf.load.stages import Placement
from tightrope.backends.hf.placement import left_over, place
from tightrope.backends.hf.room import Asked, Workspace, card_steps, card_workspace, host_workspace, most_pages
from tightrope.backends.hf.workspace import CardWorkspace
from tightrope.backends.memory import GIB
from tightrope.backends.planning import DeviceShare
from tightrope.backends.settings import ModelSettings
from tightrope.kernels.forms.layout import PAGE, CacheDtype, CacheFormat

_NEVER = 1 << 62  # No device has so many bytes.


@dataclass(frozen=True, slots=True)
class Place:
    """A device, and bytes of it that weights, cache and workspace may take."""

    device: torch.device
    usable_bytes: int

    def __str__(self) -> str:
        return "the machine's own memory" if self.device.type == "cpu" else str(self.device)


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Bytes of weights by layer, on a card and in the machine's memory; the last layer with all that follows it."""

    on_card: tuple[int, ...]
    on_host: tuple[int, ...]
    before_on_card: int  # What comes before the first layer, but for a table of which a step needs few rows.
    before_on_host: int
    table_bytes: int  # That table, in the machine's memory beside cards.

    @classmethod
    def of(cls, blueprint: Blueprint, adapter_bytes: int) -> "LayerSizes":
        """Of a blueprint by `each_apart`. Adapters are counted with all layers alike."""
        before, *layers, after = blueprint.parts
        added = -(-adapter_bytes // len(layers))

        def on_card(sizes: Sequence[int], others: Sequence[int]) -> int:
            return arena_bytes(sizes) + held_bytes(others)

        cards = [on_card(blueprint.block_sizes_of(one), blueprint.other_sizes_of(one)) for one in (*layers, after)]
        hosts = [blueprint.file_bytes_of(one) for one in (*layers, after)]
        for sizes in (cards, hosts):
            sizes[-2:] = [sum(sizes[-2:])]
        return cls(
            tuple(size + added for size in cards),
            tuple(size + added for size in hosts),
            on_card(blueprint.block_sizes_of(before), blueprint.other_sizes_of(before)),
            blueprint.file_bytes_of(before),
            blueprint.host_bytes,
        )


def each_apart(device: torch.device, num_layers: int) -> Placement:
    """Every layer by itself, and what comes before the first and behind the last: to learn the sizes of each."""
    return [(device, 0), *[(device, 1)] * num_layers, (device, 0)]


@dataclass(frozen=True)
class SplitRoom:
    """A Space of several places. `most_on_first` layers go to the first; None: as many as it holds.

    workspaces: of each place, with the head and without.
    """

    settings: ModelSettings
    shape: ModelShape
    places: tuple[Place, ...]
    sizes: LayerSizes
    host: HostWorkspace
    card: CardWorkspace
    step_tokens: tuple[int, ...]
    run_reserve_bytes: int
    host_bytes: int | None
    most_on_first: int | None = None

    @classmethod
    def of(
        cls, settings: ModelSettings, blueprint: Blueprint, places: Sequence[Place], adapter_bytes: int,
        host_bytes: int | None,
    ) -> "SplitRoom":  # fmt: skip
        """blueprint: drawn by `each_apart`. host_bytes: what the machine has for runs; None: where a place is in it."""
        steps = card_steps(settings) if places[-1].device.type != "cpu" else (settings.step_tokens_on("cpu"),)
        card = replace(card_workspace(settings, blueprint), is_recorded=len(places) == 1)
        sizes = LayerSizes.of(blueprint, adapter_bytes)
        reserve = settings.cache.host_reserve_bytes
        host = host_workspace(settings, blueprint)
        return cls(settings, blueprint.shape, tuple(places), sizes, host, card, steps, reserve, host_bytes)

    @property
    def usable_bytes(self) -> int:
        return sum(place.usable_bytes for place in self.places)

    @property
    def weight_bytes(self) -> int:
        """With all layers on the last kind of place."""
        return sum(self._weights(len(self.places) - 1))

    @cached_property
    def workspace(self) -> Workspace:
        return _Sum(tuple(self.workspace_of(number, self.shape.num_layers) for number in range(len(self.places))))

    def workspace_of(self, number: int, num_layers: int) -> Workspace:
        """That of a place with so many layers; only the last has the head."""
        shape = replace(self.shape, num_layers=num_layers, windows=self.shape.windows[:num_layers])
        has_head = number == len(self.places) - 1
        if self.places[number].device.type == "cpu":
            return replace(self.host, shape=shape, has_head=has_head)
        windows = self.shape.windows  # A card with windowed layers alone needs less, and is planned with as much.
        return replace(self.card, shape=replace(shape, windows=windows), has_head=has_head)

    def _weights(self, number: int) -> tuple[int, ...]:
        return self.sizes.on_host if self.places[number].device.type == "cpu" else self.sizes.on_card

    def _cache(self, pages: int, dtype: CacheDtype, step: int) -> list[int]:
        """Bytes of each layer's pages."""
        shape = self.shape
        token_bytes = CacheFormat(dtype, shape.num_kv_heads, shape.head_dim).bytes_per_token
        windows = [window for window in shape.windows if window is not None]
        most = most_needed(max(windows), self.settings.max_num_seqs + KEPT_WINDOWS, step) if windows else pages
        return [PAGE * token_bytes * (pages if window is None else min(pages, most)) for window in shape.windows]

    def _costs(self, pages: int, dtype: CacheDtype, step: int) -> list[list[int]]:
        """Bytes of weights and cache of each layer on each place; the last layer, with the head, is for the last."""
        cache, last = self._cache(pages, dtype, step), len(self.places) - 1
        costs = [
            [weights + kept for weights, kept in zip(self._weights(number), cache, strict=True)]
            for number in range(last + 1)
        ]
        return [mine if number == last else [*mine[:-1], _NEVER] for number, mine in enumerate(costs)]

    def _rooms(self, step: int, window: int) -> list[int]:
        """Bytes of each place for its layers' weights and cache."""
        rooms = []
        for number, where in enumerate(self.places):
            room = where.usable_bytes - self.workspace_of(number, self.shape.num_layers).num_bytes(step, window)
            if where.device.type != "cpu":
                room -= LARGE_ROUND  # The block of weights is a whole number of these.
            if number == 0:  # Where it takes no layer the next one has it, and has the room that was kept here.
                room -= self._before(number)
            rooms.append(room)
        return rooms

    def _before(self, number: int) -> int:
        return self.sizes.before_on_host if self.places[number].device.type == "cpu" else self.sizes.before_on_card

    def counts(self, dtype: CacheDtype, step: int, window: int, pages: int) -> tuple[int, ...]:
        """How many layers each place takes; () where they have no room."""
        rooms = self._rooms(step, window or pages * PAGE)
        most = None
        if self.most_on_first is not None:
            most = [self.most_on_first, *[self.shape.num_layers] * (len(self.places) - 1)]
        found = place(self._costs(pages, dtype, step), rooms, most)
        return found if found and self._can_load(found, step) else ()

    def _can_load(self, counts: Sequence[int], step: int) -> bool:
        """Whether keys can be calibrated before there is a cache."""
        start = 0
        for number, (where, count) in enumerate(zip(self.places, counts, strict=True)):
            weights = sum(self._weights(number)[start : start + count])
            start += count
            if weights + self.workspace_of(number, count).load_bytes(step) > where.usable_bytes:
                return False
        return True

    def shares(self, counts: Sequence[int], dtype: CacheDtype, step: int, window: int, pages: int) -> list[DeviceShare]:
        """What is planned for on each place that has layers."""
        found: list[DeviceShare] = []
        start, cache = 0, self._cache(pages, dtype, step)
        for number, (where, count) in enumerate(zip(self.places, counts, strict=True)):
            mine = slice(start, start + count)
            start += count
            if count:
                weights = sum(self._weights(number)[mine]) + (0 if found else self._before(number))
                workspace = self.workspace_of(number, self.shape.num_layers).num_bytes(step, window)
                found.append(
                    DeviceShare(str(where.device), where.usable_bytes, weights, sum(cache[mine]), workspace, count)
                )
        return found

    def fitting(self, settings: ModelSettings, shape: ModelShape, dtype: CacheDtype, step: int, window: int = 0) -> int:
        """See Room."""
        return most_pages(lambda pages: bool(self.counts(dtype, step, window, pages)))

    def largest_window(self, settings: ModelSettings, shape: ModelShape, dtype: CacheDtype) -> int:
        """See Room."""
        return self.fitting(settings, shape, dtype, self.step_tokens[-1]) * PAGE

    def host_left(self, device_bytes: int) -> int:
        """See Room. Where layers are in the machine's memory, too, what `device_bytes` leave of it at least."""
        if self.host_bytes is not None:
            return self.host_bytes
        weights = self.sizes.before_on_host + sum(self.sizes.on_host[: self.most_on_first])
        return max(0, self.places[0].usable_bytes - weights - device_bytes) + self.run_reserve_bytes

    def refusal(self, asked: Asked, smaller: Sequence[str], most_tokens: int) -> DoesNotFit:
        """See Room."""
        pages = -(-asked.tokens // PAGE)
        short = left_over(self._costs(pages, asked.dtype, asked.step), self._rooms(asked.step, asked.window))
        names = " and ".join(f"{where} ({where.usable_bytes / GIB:.2f} GiB)" for where in self.places)
        ways = [f"take --kv-cache {' or '.join(f'--kv-cache {name}' for name in smaller)[11:]}"] if smaller else []
        ways += [f"ask for at most {most_tokens} tokens"] if most_tokens else []
        return DoesNotFit(
            f"weights and a cache of {asked.tokens} tokens as {asked.dtype} need {short / GIB:.2f} GiB more than "
            f"{names} have room for: {', or '.join(ways) or 'take a smaller model, or add a device'}"
        )


@dataclass(frozen=True, slots=True)
class _Sum:
    """Workspaces of several devices together."""

    parts: tuple[Workspace, ...]

    def num_bytes(self, tokens: int, window: int) -> int:
        return sum(part.num_bytes(tokens, window) for part in self.parts)

    def load_bytes(self, tokens: int) -> int:
        return sum(part.load_bytes(tokens) for part in self.parts)

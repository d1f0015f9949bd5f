"""What `plan` tells of a folder's model: on one device, in ranks over several, or layer by layer over several."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from tightrope.backends.devices.choice import choose_device
from tightrope.backends.devices.spread import are_alike
from tightrope.backends.errors import BackendError, DoesNotFit
from tightrope.backends.files.peft import room_for_adapters
from tightrope.backends.hf import plan as hf
from tightrope.backends.hf.layer_split import Place, SplitRoom, each_apart
from tightrope.backends.hf.layered import cards_of, host_of
from tightrope.backends.hf.laying_out import LaidOut, lay_out
from tightrope.backends.hf.load.inspection import Inspect, Inspection
from tightrope.backends.hf.load.inspection import inspect as inspect_folder
from tightrope.backends.hf.ranks.opening import check_no_card_is_named
from tightrope.backends.hf.ranks.rooms import host_rooms
from tightrope.backends.hf.room import CacheSizes, Space, check_host, host_workspace, room_on
from tightrope.backends.hf.workspace import token_bytes
from tightrope.backends.memory import GIB, RANK_BYTES, CardMemory, free_for, grossed_up, spare_bytes
from tightrope.backends.planning import CACHE_NAMES, CacheChoice, Chosen, DeviceShare, Outline, rank_name
from tightrope.backends.settings import MAX_CARDS, MAX_RANKS, ModelSettings
from tightrope.backends.tensor_parallel import ALONE, Share, heads
from tightrope.kernels.forms.layout import PAGE

NO_TOKENIZER = "tokenizer: the folder holds none, and serve refuses it without; copy the model's own"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be planned, as the command names it. Bytes: of the machine's memory; None: see detect.outline.

    cards: those that there are, in order; None: the model goes to the CPU.
    """

    folder: Path
    settings: ModelSettings
    memory_bytes: int | None
    cards: Mapping[torch.device, CardMemory] | None
    inspect: Inspect

    @property
    def host_bytes(self) -> int:
        """Of the machine's memory, as what is free there."""
        return free_for(self.settings) if self.memory_bytes is None else grossed_up(self.memory_bytes)


def outline_folder(
    folder: Path, settings: ModelSettings, memory_bytes: int | None, device_bytes: tuple[int, ...] | None = None,
    inspect: Inspect | None = None,
) -> Outline:  # fmt: skip
    """See BackendPackage. inspect: of what isn't a folder, but runs as one."""
    cards = _cards_here(settings) if device_bytes is None else _cards_named(settings, device_bytes)
    device = torch.device("cpu") if cards is None else next(iter(cards))
    asked = Asked(folder, settings, memory_bytes, cards, inspect or inspect_folder)
    if settings.gpu_split is not None:
        return _in_layers(asked)
    ranks = settings.tensor_parallel if settings.tensor_parallel >= 0 else len(cards or (0,))
    if ranks > 1:
        return _in_ranks(asked, ranks)
    alone = _alone(asked, device)
    if alone.refusal is None or ranks or cards is None or len(cards) == 1:
        return alone
    if are_alike([card.free_bytes for card in cards.values()]):
        found = _in_ranks(asked, min(len(cards), MAX_RANKS))
        if found.refusal is None:
            return found
    return _in_layers(asked)


def _cards_here(settings: ModelSettings) -> dict[torch.device, CardMemory] | None:
    """Those of this machine that --device leaves, with what is free there; None where it is the CPU."""
    device = choose_device(settings.device)
    if device.type == "cpu":
        return None
    count = 1 if settings.device.startswith("cuda:") else torch.cuda.device_count()
    cards = [device] if count == 1 else [torch.device("cuda", number) for number in range(count)]
    return {card: CardMemory(*torch.cuda.mem_get_info(card)) for card in cards}


def _cards_named(settings: ModelSettings, sizes: Sequence[int]) -> dict[torch.device, CardMemory]:
    """Cards of these sizes; with --device cuda:N that one of them, or the only one. Raises BackendError."""
    cards = {torch.device("cuda", number): CardMemory(size, size) for number, size in enumerate(sizes)}
    if not settings.device.startswith("cuda:"):
        return cards
    one = torch.device(settings.device)
    if len(sizes) == 1:
        return {one: CardMemory(sizes[0], sizes[0])}
    if one not in cards:
        raise BackendError(
            f"--device {settings.device}: sizes of {len(sizes)} cards are named, cuda:0 to cuda:{len(sizes) - 1}"
        )
    return {one: cards[one]}


def _alone(asked: Asked, device: torch.device) -> Outline:
    """On one device."""
    settings = asked.settings
    found = asked.inspect(asked.folder, settings, device)
    blueprint = found.blueprint
    card = None if asked.cards is None else asked.cards[device]
    adapter_bytes = room_for_adapters(settings, blueprint.adapters.read)
    room = room_on(device, settings, blueprint, adapter_bytes, host_bytes=asked.memory_bytes, card=card)

    def chosen() -> hf.HFPlan:
        check_host(blueprint, asked.memory_bytes)
        plan = hf.make_plan(settings, found.shape, room)
        hf.check_layers(plan, blueprint.layers)
        return plan

    return _told(asked, found, room, chosen)


def _in_ranks(asked: Asked, count: int) -> Outline:
    """A rank of the model on each of so many devices, or all on the machine's CPU. Raises BackendError."""
    settings, cards = asked.settings, asked.cards
    if cards is not None and len(cards) < count:
        there = f"{len(cards)} device" + ("s" if len(cards) > 1 else "")
        check_no_card_is_named(settings, count)
        sizes = ",".join([f"{list(cards.values())[-1].free_bytes / GIB:.4g}GiB"] * count)
        raise BackendError(f"--tensor-parallel {count} wants {count} devices, and there is {there}: --devices {sizes}")
    device = torch.device("cpu") if cards is None else next(iter(cards))
    ranks = _parts(asked, device, count)
    added = room_for_adapters(settings, ranks[0].blueprint.adapters.read)
    rooms = _rank_rooms(asked, ranks, added)
    names = [rank_name(rank, device.type) for rank in range(count)]

    def plans(settings: ModelSettings) -> list[hf.HFPlan]:
        made = []
        for name, found, room in zip(names, ranks, rooms, strict=True):
            try:
                check_host(found.blueprint, asked.memory_bytes)
                made.append(hf.make_plan(settings, found.blueprint.local, room))
            except DoesNotFit as error:
                raise DoesNotFit(f"{name}: {error}{_more_ranks(asked, count)}") from None
        return made

    def chosen() -> hf.HFPlan:
        """What the rank with the least room has, as all of them take it."""
        made = plans(settings)
        pages, window = min(plan.num_pages for plan in made), min(plan.window for plan in made)
        step = min(plan.step_tokens for plan in made)
        cache = settings.cache.model_copy(update={"tokens": pages * PAGE})
        least = {"max_model_len": window, "step_tokens": step, "cache": cache}
        made = plans(settings.model_copy(update=least))
        of_all.extend(made)
        return replace(
            made[0],
            cache_bytes=sum(plan.cache_bytes for plan in made),
            workspace_bytes=sum(plan.workspace_bytes for plan in made),
        )

    of_all: list[hf.HFPlan] = []
    told = _told(asked, ranks[0], rooms[0], chosen, list(zip(ranks, rooms, strict=True)))
    window, step = told.window, told.chosen.step_tokens if told.chosen else rooms[0].step_tokens[-1]
    shares = []
    for number, (name, found, room) in enumerate(zip(names, ranks, rooms, strict=True)):
        workspace = room.workspace.num_bytes(step, window)
        kept = CacheSizes.of(settings, found.blueprint.local, hf.cache_dtype(settings), step)
        cache = of_all[number].cache_bytes if of_all else kept.bytes_of(-(-window // PAGE))
        shares.append(DeviceShare(name, room.usable_bytes, room.weight_bytes, cache, workspace))
    return replace(told, shares=tuple(shares), device=device.type, process_bytes=RANK_BYTES * (count - 1))


def _parts(asked: Asked, device: torch.device, count: int) -> list[Inspection]:
    """What each rank has of the model; ranks with as many heads and columns have as many bytes."""
    first = asked.inspect(asked.folder, asked.settings, device, Share(0, count))
    shape = first.shape
    totals = shape.hidden_size, shape.intermediate_size, shape.expert_size, shape.vocab_size
    by_heads = heads(shape.num_heads, shape.num_kv_heads, count)

    def sizes(rank: int) -> tuple[int, ...]:
        columns = (Share(rank, count).columns(total) for total in totals)
        return (by_heads[rank].num_queries, by_heads[rank].num_keys, *(end - begin for begin, end in columns))

    known = {sizes(0): first}
    for rank in range(1, count):
        if sizes(rank) not in known:
            known[sizes(rank)] = asked.inspect(asked.folder, asked.settings, device, Share(rank, count))
    return [known[sizes(rank)] for rank in range(count)]


def _rank_rooms(asked: Asked, ranks: Sequence[Inspection], adapter_bytes: int) -> list[Space]:
    """Each rank's, of a card of its own or of the machine's memory, where all have room for as many tokens."""
    settings, device = asked.settings, ranks[0].blueprint.device
    if asked.cards is not None:
        return [
            room_on(device, settings, found.blueprint, adapter_bytes, host_bytes=asked.memory_bytes, card=card)
            for found, card in zip(ranks, asked.cards.values(), strict=False)
        ]
    dtype, first = hf.cache_dtype(settings), ranks[0].blueprint
    weights = [found.blueprint.weight_bytes + adapter_bytes for found in ranks]
    tokens = [token_bytes(found.blueprint.local, dtype) for found in ranks]
    free_bytes = asked.host_bytes - RANK_BYTES * (len(ranks) - 1)
    rooms = host_rooms(settings, host_workspace(settings, first), weights, tokens, free_bytes)
    return [
        room_on(device, settings, found.blueprint, adapter_bytes, host_bytes=max(1, room))
        for found, room in zip(ranks, rooms, strict=True)
    ]


def _more_ranks(asked: Asked, count: int) -> str:
    """How many devices like the last one would hold the model in ranks, as the end of a line; empty: none would."""
    if asked.cards is None:
        return ""
    card, settings, device = list(asked.cards.values())[-1], asked.settings, next(iter(asked.cards))
    for more in range(count + 1, MAX_RANKS + 1):
        try:
            found = asked.inspect(asked.folder, settings, device, Share(0, more))
            added = room_for_adapters(settings, found.blueprint.adapters.read)
            room = room_on(device, settings, found.blueprint, added, host_bytes=asked.memory_bytes, card=card)
            hf.make_plan(settings, found.blueprint.local, room)
            return f"; {more} devices of {card.free_bytes / GIB:.4g}GiB would do"
        except DoesNotFit:
            continue
        except BackendError:
            break  # It can't be split so often.
    return ""


def _in_layers(asked: Asked) -> Outline:
    """Its layers over several devices, and on the CPU where these hold too few. Raises BackendError."""
    settings = asked.settings
    if asked.cards is None:
        raise BackendError("--gpu-split lays layers out on cards, and there is none here; name some with --devices")
    places = cards_of(settings, asked.cards)
    if not places:
        raise BackendError("--gpu-split: no card has room for anything beside what stays free there")
    free_bytes, device = asked.host_bytes, next(iter(asked.cards))
    found = inspect_folder(asked.folder, settings, device, ALONE, partial(each_apart, device))
    adapter_bytes = room_for_adapters(settings, found.blueprint.adapters.read)
    host = host_of(settings, free_bytes)
    runs = spare_bytes(found.blueprint.host_bytes, free_bytes)
    room = SplitRoom.of(settings, found.blueprint, places, adapter_bytes, runs)
    laid: LaidOut | None = None
    short: DoesNotFit | None = None
    try:
        laid = lay_out(settings, found.blueprint, places, host, adapter_bytes, free_bytes)
        room = laid.room
    except DoesNotFit as error:
        short = DoesNotFit(f"{error}{_more_cards(asked, found, places, adapter_bytes)}")

    def chosen() -> hf.HFPlan:
        check_host(found.blueprint, asked.memory_bytes)
        if laid is None:
            raise short or DoesNotFit("")
        return replace(laid.plan, notes=(*laid.notes, *laid.plan.notes))

    told = _told(asked, found, room, chosen)
    if laid is None:
        return told
    shares = laid.shares
    host_bytes = sum(share.weight_bytes for share in shares if share.device == "cpu") or found.blueprint.host_bytes
    return replace(
        told,
        shares=shares,
        memory_bytes=sum(share.memory_bytes for share in shares if share.device != "cpu"),
        weight_bytes=sum(share.weight_bytes for share in shares if share.device != "cpu"),
        workspace_bytes=sum(share.workspace_bytes for share in shares if share.device != "cpu"),
        host_bytes=host_bytes,
    )


def _more_cards(asked: Asked, found: Inspection, places: Sequence[Place], adapter_bytes: int) -> str:
    """How many cards like the last one would hold all layers, as the end of a line; empty: none would."""
    last = places[-1]
    for count in range(len(places) + 1, 1 if asked.settings.device.startswith("cuda:") else MAX_CARDS + 1):
        others = [replace(last, device=torch.device("cuda", number)) for number in range(len(places), count)]
        try:
            lay_out(asked.settings, found.blueprint, [*places, *others], None, adapter_bytes, asked.host_bytes)
        except DoesNotFit:
            continue
        return f"; {count} devices would do, the further ones with {last.usable_bytes / GIB:.2f} GiB to take"
    return ""


def _told(
    asked: Asked, found: Inspection, room: Space, make: Callable[[], hf.HFPlan],
    ranks: Sequence[tuple[Inspection, Space]] = (),
) -> Outline:  # fmt: skip
    """The outline of a model in a room, or of ranks in theirs. make: its plan; raises DoesNotFit."""
    settings, shape, blueprint = asked.settings, found.shape, found.blueprint
    window = hf.served_window(settings, shape, hf.rope_of(settings, shape))
    step = room.step_tokens[0]
    all_ranks = ranks or [(found, room)]
    workspace_bytes = sum(one.workspace.num_bytes(step, window) for _, one in all_ranks)
    chosen, refusal = None, None
    try:
        plan = make()
        notes = (*plan.notes, *found.notes, *([] if found.tokenizer is not None else [NO_TOKENIZER]))
        window, step = plan.window, plan.step_tokens
        workspace_bytes = plan.workspace_bytes
        chosen = Chosen(plan.cache_dtype, plan.num_pages * PAGE, plan.cache_bytes, notes, step)
    except DoesNotFit as error:
        refusal = str(error)
    shapes = [one.blueprint.local for one, _ in all_ranks]
    return Outline(
        path=asked.folder,
        architecture=shape.model_type,
        format=blueprint.format,
        device=blueprint.device.type,
        memory_bytes=sum(one.usable_bytes for _, one in all_ranks),
        host_bytes=sum(one.blueprint.host_bytes for one, _ in all_ranks),
        weight_bytes=sum(one.weight_bytes for _, one in all_ranks),
        workspace_bytes=workspace_bytes,
        trained_len=shape.trained_len,
        window=window,
        caches=tuple(
            CacheChoice(
                name,
                sum(token_bytes(one, name) for one in shapes),
                sum(CacheSizes.of(settings, one, name, step).bytes_of(-(-window // PAGE)) for one in shapes),
                min(one.largest_window(settings, mine, name) for (_, one), mine in zip(all_ranks, shapes, strict=True)),
            )
            for name in CACHE_NAMES
        ),
        chosen=chosen,
        refusal=refusal,
    )

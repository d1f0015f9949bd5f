"""What is decided before loading: window, cache type and capacity, which layers lie on cards, and whether it fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tightrope.backends.errors import DoesNotFit
from tightrope.backends.files.gguf.header import Header
from tightrope.backends.gguf.cache_types import AUTO, AUTO_ON_CARDS, CACHE_TYPES, CacheType
from tightrope.backends.gguf.layout import CELL_GRAIN, Layout, Memory
from tightrope.backends.gguf.native import ContextOptions
from tightrope.backends.gguf.rope import RopePlan, plan_rope
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.memory import GIB, MIB, default_tokens, does_not_fit
from tightrope.backends.planning import LEAST_WINDOW, DeviceShare, MemoryShares
from tightrope.backends.settings import ModelSettings, written
from tightrope.backends.threads import compute_threads

# What the start says of cached tokens.
MOVED = "cached tokens: what stands behind a removed message is moved, and computed again while nothing runs"
EXACT, COMPUTED = "cached tokens: exact ones alone", "behind a removed message all is computed"
MAX_CHECKPOINTS = 32  # A chat leaves two to four for each turn, and the latest few are of use.
CHECKPOINT_EXTRA = 64 << 10  # llama.cpp writes positions, types and sizes of each layer, too.


@dataclass(frozen=True, slots=True)
class GGUFPlan:
    """Everything a load needs; sizes in tokens."""

    window: int
    num_cells: int
    run_bytes: int  # Finished sequences may take so much of the host's memory beside the cache.
    checkpoint_bytes: int  # Beside that, copies of states take so much, of models that can't go back without them.
    can_move: bool  # Cached tokens may be moved to other positions.
    cache_type: CacheType
    step_tokens: int
    max_outputs: int
    layout: Layout
    on_cards: tuple[int, ...]  # So many slots of the layout are on each card, in order.
    rope: RopePlan
    notes: tuple[str, ...]


def make_plan(settings: ModelSettings, header: Header, memory: Memory, adapter_bytes: int = 0) -> GGUFPlan:
    """Decide what to allocate in a memory for weights, adapters, cache and workspace.

    Raises DoesNotFit, with what would fit, when what is asked for doesn't.
    """
    layout = Layout.of(settings, header, memory, adapter_bytes)
    rope = plan_rope(settings.rope, layout.shape)
    asked = settings.max_model_len or rope.window
    cache_type, reason = _choose_type(settings, layout, asked)
    window, num_cells = _choose_cells(settings, layout, asked, cache_type)
    on_cards = layout.counts(num_cells, cache_type)
    cache_bytes = int(num_cells * layout.token_bytes(cache_type))
    spare_bytes = memory.host_room - layout.host_need(num_cells, cache_type) + layout.run_bytes
    run_bytes = settings.cache.host_run_bytes(cache_bytes, spare_bytes)
    left_bytes = max(0, spare_bytes - run_bytes)
    checkpoint_bytes = min(MAX_CHECKPOINTS * _checkpoint_bytes(layout, cache_type, window), left_bytes // 2)
    notes = [f"device: cpu; {memory.unused}"] if memory.unused else []
    notes.append(rope.describe(window))
    if window > rope.window:
        notes.append(f"window: {window} tokens, more than the {rope.window} that the model is made for")
    if window < asked:
        notes.append(f"window: {window} tokens, what memory holds of the {asked} that the model is made for")
    notes.append(
        f"cache: {num_cells} tokens as {cache_type.name}, {cache_bytes / GIB:.2f} GiB; {reason}; "
        f"finished chats may take {run_bytes / GIB:.2f} GiB beside it"
    )
    why_fixed = _why_fixed(header, layout.shape, cache_type, rope)
    notes.append(_reuse(settings, layout, cache_type, window, checkpoint_bytes, why_fixed))
    notes += _on_cards(layout, on_cards, num_cells, cache_type)
    step_tokens = min(layout.step_tokens, num_cells)
    return GGUFPlan(
        window=window,
        num_cells=num_cells,
        run_bytes=run_bytes,
        checkpoint_bytes=checkpoint_bytes,
        can_move=why_fixed is None,
        cache_type=cache_type,
        step_tokens=step_tokens,
        max_outputs=layout.max_outputs,
        layout=layout,
        on_cards=on_cards,
        rope=rope,
        notes=tuple(notes),
    )


def memory_shares(plan: GGUFPlan) -> MemoryShares:
    """What a plan takes."""
    layout, num_cells, kind = plan.layout, plan.num_cells, plan.cache_type
    is_on_cards = layout.num_on_cards > 0
    return MemoryShares(
        device=layout.device,
        memory_bytes=layout.usable_bytes,
        weight_bytes=layout.card_weight_bytes if is_on_cards else layout.host_weight_bytes,
        host_bytes=layout.host_weight_bytes if is_on_cards else 0,
        workspace_bytes=(
            layout.card_workspace_bytes(num_cells, kind) if is_on_cards else layout.workspace_bytes(num_cells)
        ),
        cache_bytes=int(num_cells * layout.token_bytes(kind)),
        run_bytes=plan.run_bytes,
        shares=device_shares(plan),
    )


def device_shares(plan: GGUFPlan) -> tuple[DeviceShare, ...]:
    """What each card has of a plan, where it has anything; none for a model in the host's memory alone."""
    layout, kind = plan.layout, plan.cache_type
    if not plan.on_cards:
        return ()
    weights, taken = (layout.taken(plan.on_cards, cells, kind) for cells in (0, plan.num_cells))
    workspace = layout.card_workspace_bytes(plan.num_cells, kind)
    return tuple(
        DeviceShare(card.name, card.memory.usable_bytes(layout.card_fraction), size, all_of_it - size, workspace, count)
        for card, count, size, all_of_it in zip(layout.memory.cards, plan.on_cards, weights, taken, strict=True)
        if count
    )


def _checkpoint_bytes(layout: Layout, kind: CacheType, window: int) -> int:
    """A bound on a checkpoint: recurrent states, or what sliding layers see, and the tokens up to there."""
    shape = layout.shape
    if not (shape.state_bytes or shape.window):
        return 0
    return shape.state_bytes + int(min(shape.window, window) * layout.token_bytes(kind)) + 4 * window + CHECKPOINT_EXTRA


def without_moves(plan: GGUFPlan) -> GGUFPlan:
    """The same where llama.cpp says that it can't rotate the model's keys on, which the header doesn't tell."""
    unmoved = f"{EXACT}, since llama.cpp can't rotate the model's keys again; {COMPUTED}"
    return replace(plan, can_move=False, notes=tuple(unmoved if note == MOVED else note for note in plan.notes))


def _why_fixed(header: Header, shape: ModelShape, kind: CacheType, rope: RopePlan) -> str | None:
    """Why cached tokens can't be moved; None where they can.

    llama.cpp keeps keys rotated, and rotates them on. Quantized ones would be rounded again, and by YaRN and longrope
    they would be scaled again.
    """
    if any(tensor.name.startswith("position_embd") for tensor in header.tensors):
        return "tokens are told where they stand before the first layer"
    if shape.state_bytes:
        return "recurrent states hold all that stands before"
    if shape.window:
        return f"layers see a window of {shape.window} tokens"
    if kind.is_quantized:
        return f"keys of {kind.name} would be rounded again"
    if rope.yarn_ext_factor is not None or (rope.scaling_type is None and shape.own_scaling is not None):
        return f"keys under {rope.how} can't be rotated again"
    return None


def _reuse(
    settings: ModelSettings, layout: Layout, kind: CacheType, window: int, checkpoint_bytes: int, why_fixed: str | None
) -> str:
    """What the start says of cached tokens."""
    if size := _checkpoint_bytes(layout, kind, window):
        return (
            f"{EXACT}, since {why_fixed}; chats go back to checkpoints, at ends of prompts and "
            f"turns and where others parted: {checkpoint_bytes // size} of up to {size / MIB:.1f} MiB"
        )
    if settings.cache.reuse == "exact":
        return f"{EXACT}, as asked; {COMPUTED}"
    if why_fixed is not None:
        return f"{EXACT}, since {why_fixed}; {COMPUTED}"
    return MOVED


def _on_cards(layout: Layout, on_cards: tuple[int, ...], num_cells: int, kind: CacheType) -> Iterator[str]:
    """What the start says of cards."""
    if not on_cards:
        return
    filled = layout.card_fillings(on_cards, num_cells, kind)
    used = [
        f"{count} on {card}, {size / GIB:.2f} of {card.memory.free_bytes / GIB:.2f} GiB"
        for count, size, card in zip(on_cards, filled, layout.memory.cards, strict=True)
        if count
    ]
    slots, left = len(layout.slots), layout.host_weight_bytes / GIB
    rows = ", and each matrix's rows are shared so" if layout.has_split_rows and len(used) > 1 else ""
    yield f"layers: {'; '.join(used)}; of {slots} with the output{rows}; {left:.2f} GiB of weights in the host's memory"
    for card in layout.memory.cards:
        if not card.attends(layout.shape, kind):
            yield (
                f"attention: {card.name} has no kernel for this model with a cache of {kind.name}, so it runs on the "
                "CPU, many times slower; another --kv-cache may have one"
            )


def _choose_type(settings: ModelSettings, layout: Layout, window: int) -> tuple[CacheType, str]:
    asked = settings.cache.dtype
    if asked != "auto":
        return CACHE_TYPES[asked], "as asked"
    need = settings.cache.tokens or window
    cards = layout.memory.cards
    kinds = [
        (kind, reason)
        for kind, reason in (AUTO_ON_CARDS if cards else AUTO)
        if all(card.attends(layout.shape, kind) for card in cards)
    ]
    for kind, reason in kinds:
        if need <= layout.fitting_tokens(kind):
            return kind, reason
    return kinds[-1] if kinds else AUTO_ON_CARDS[0]  # It is too large as well: the window is made shorter, or refused.


def _choose_cells(settings: ModelSettings, layout: Layout, window: int, kind: CacheType) -> tuple[int, int]:
    """The window, in tokens, and the cells of the cache. Raises DoesNotFit."""
    fitting = layout.fitting_tokens(kind)
    if not settings.max_model_len and not settings.cache.tokens and fitting >= LEAST_WINDOW:
        window = min(window, fitting)
    least = settings.cache.tokens or window
    if least > fitting:
        raise _refusal(layout, least, kind, fitting)
    wanted = settings.cache.tokens or default_tokens(window, settings.max_num_seqs)
    return window, -(-min(wanted, fitting) // CELL_GRAIN) * CELL_GRAIN


def _refusal(layout: Layout, tokens: int, kind: CacheType, fitting: int) -> DoesNotFit:
    size = layout.token_bytes(kind)
    smaller = [
        other.name
        for other in (CACHE_TYPES["q8"], CACHE_TYPES["q4"])
        if layout.token_bytes(other) < size and layout.fitting_tokens(other) >= tokens
    ]
    host_left = layout.memory.host_room - layout.host_need(tokens, kind)
    if not layout.num_on_cards:
        cache_bytes = int(tokens * size)
        taken = layout.host_need(tokens, kind) - cache_bytes
        refusal = does_not_fit(tokens, kind.name, cache_bytes, host_left + cache_bytes, taken, smaller, fitting)
        return DoesNotFit(f"{refusal}; {layout.memory.unused}") if layout.memory.unused else refusal
    ways = [f"take --kv-cache {name}" for name in smaller]
    if host_left < 0 and (layers := layout.least_on_cards(tokens, kind)):
        ways.append(f"put {layers} layers there (--gpu-layers {layers})")
    if layers := layout.most_on_cards(tokens, kind):
        ways.append(f"put at most {layers} layers there (--gpu-layers {layers})")
    if layers := layout.least_cpu_experts(tokens, kind):
        ways.append(f"leave the experts of {layers} layers in the host's memory (--n-cpu-moe {layers})")
    if layout.proportions and replace(layout, proportions=()).fits(tokens, kind):
        ways.append("leave out --tensor-split")
    if fitting:
        ways.append(f"ask for at most {fitting} tokens")
    what = f"{layout.num_on_cards} layers and a cache of {tokens} tokens as {kind.name}"
    if host_left < 0:
        need = layout.host_need(tokens, kind) / GIB
        short = (
            f"{what} leave {need:.2f} GiB for the host's memory, and {layout.memory.host_room / GIB:.2f} GiB is free"
        )
    elif layout.proportions and (over := _fullest(layout, tokens, kind)) is not None:
        short = f"{what} {over}"
    else:
        need, free = layout.card_need(tokens, kind), sum(max(0, room) for room in layout.card_rooms(tokens, kind))
        names = " and ".join(card.name for card in layout.memory.cards) + (", in pieces" if need <= free else "")
        short = f"{what} need {need / GIB:.2f} GiB beside the workspace, and {free / GIB:.2f} GiB is free on {names}"
    return DoesNotFit(f"{short}: {', or '.join(ways) or 'take a smaller model'}")


def _fullest(layout: Layout, tokens: int, kind: CacheType) -> str | None:
    """The card that gets most above what it has room for, by the proportions that were given."""
    taken = layout.taken(layout.fixed_counts(tokens, kind), tokens, kind)
    rooms = layout.card_rooms(tokens, kind)
    over, card, need = max(
        (need - room, card.name, need) for card, need, room in zip(layout.memory.cards, taken, rooms, strict=True)
    )
    if over <= 0:
        return None
    free = max(0, need - over) / GIB
    given = written(layout.proportions)
    return (
        f"need {need / GIB:.2f} GiB on {card} by --tensor-split {given}, beside the workspace, and {free:.2f} GiB is "
        "free there"
    )


def context_options(settings: ModelSettings, plan: GGUFPlan) -> ContextOptions:
    """What a plan's context is made with."""
    return ContextOptions(
        num_cells=plan.num_cells,
        max_seqs=plan.layout.max_seqs,
        batch_tokens=plan.step_tokens,
        ubatch_tokens=plan.step_tokens,
        max_outputs=plan.max_outputs,
        threads=compute_threads(settings.threads),
        type_k=plan.cache_type.key_type,
        type_v=plan.cache_type.value_type,
        flash_attention=plan.cache_type.flash_attention,
        own_attention=plan.cache_type.flash_attention and not plan.layout.num_on_cards,
        offload_cache=plan.layout.num_on_cards > 0,
        rope_scaling_type=plan.rope.scaling_type,
        rope_freq_base=plan.rope.freq_base,
        rope_freq_scale=plan.rope.freq_scale,
        yarn_orig_ctx=plan.rope.yarn_orig_ctx,
        yarn_ext_factor=plan.rope.yarn_ext_factor,
    )


def least_options() -> ContextOptions:
    """The smallest context, for a model whose window doesn't fit."""
    kind = CACHE_TYPES["f16"]
    return ContextOptions(
        num_cells=CELL_GRAIN,
        max_seqs=1,
        batch_tokens=CELL_GRAIN,
        ubatch_tokens=CELL_GRAIN,
        max_outputs=1,
        threads=1,
        type_k=kind.key_type,
        type_v=kind.value_type,
        flash_attention=kind.flash_attention,
    )

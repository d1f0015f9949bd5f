"""A Hugging Face folder as a Backend: chunks of token ids in, logits out, over our own paged cache."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tightrope.backends.adapters import AdapterRoom
from tightrope.backends.devices.choice import choose_device, describe_card
from tightrope.backends.devices.host import look
from tightrope.backends.errors import BackendError
from tightrope.backends.files.chat_templates import DEFAULT
from tightrope.backends.files.peft import room_for_adapters
from tightrope.backends.hf.adapters.rows import Adapters
from tightrope.backends.hf.adapters.token_owners import tokenizer_at
from tightrope.backends.hf.cache.pages import PagedKVCache
from tightrope.backends.hf.cache.stored_pages import Placed, StoredPages
from tightrope.backends.hf.load.inspection import Inspect, Inspection, NamedTokenizer, inspect
from tightrope.backends.hf.load.model import LoadedModel, build
from tightrope.backends.hf.modules.rotary import fix_rotary
from tightrope.backends.hf.modules.step import scratch_bytes
from tightrope.backends.hf.movable import reuse_note, why_unmovable
from tightrope.backends.hf.plan import HFPlan, check_layers, make_plan, memory_shares
from tightrope.backends.hf.room import check_host, room_on
from tightrope.backends.hf.run.calibrate import key_factors
from tightrope.backends.hf.run.device_errors import failing_as
from tightrope.backends.hf.run.graphs import batch_size
from tightrope.backends.hf.run.rotary import RotarySets
from tightrope.backends.hf.run.steps import StepBuilder, StepInputs
from tightrope.backends.hf.run.variants import CacheVariants
from tightrope.backends.hf.run.warmup import Steps, warm_up
from tightrope.backends.hf.runner import ModelRunner
from tightrope.backends.hf.text.tokenizer import HFTokenizer
from tightrope.backends.memory import prompt_rows
from tightrope.backends.protocol import AdapterStore, Capabilities, Chunk, KVCache, ModelCard, Tokenizer
from tightrope.backends.sessions.opening import check_folder, open_store
from tightrope.backends.sessions.piece import Bytes
from tightrope.backends.settings import ModelSettings
from tightrope.backends.sharing import Threads
from tightrope.backends.threads import compute_threads
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import PAGE, CacheFormat, LayerCache

log = logging.getLogger("tightrope.hf")

# Shares of the progress: of weights, of kernels, and of the calibration of keys. The rest is recordings of steps.
WEIGHTS, KERNELS, KEYS = 0.9, 0.04, 0.03


class HFBackend:
    """Backend over transformers' module tree with our own modules: books, layouts and words here, the rest in a runner.

    `runner` holds weights and caches, `steps` lays out what it is sent, and `kv` are the books of its pages.
    """

    def __init__(
        self, path: Path, settings: ModelSettings, progress: Callable[[float], None], inspect: Inspect = inspect
    ) -> None:
        """Load what `inspect` finds at `path`, a folder, calling `progress` with the share done.

        Raises BackendError. Files and settings are checked, and the memory is planned, before anything large is
        allocated.
        """
        check_folder(settings.cache)
        host = look()
        device = choose_device(settings.device, host)
        found = inspect(path, settings, device)
        notes = [f"device: {describe_card(device, host)}"] if device.type == "cuda" else []
        notes += found.notes
        adapter_bytes = room_for_adapters(settings, found.blueprint.adapters.read)
        check_host(found.blueprint)
        room = room_on(device, settings, found.blueprint, adapter_bytes)
        plan = make_plan(settings, found.shape, room)
        check_layers(plan, found.blueprint.layers)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(settings.gpu_memory_fraction, device)
        if plan.rope:
            fix_rotary(found.blueprint.tree, plan.rope)  # The window may be shorter than the model's own.
        tokenizer = found.tokenizer or HFTokenizer(path, found.shape)  # The latter says what the folder lacks.
        threads = Threads(compute_threads(settings.threads), dispatch.set_threads)
        # Its threads wait for their next work by spinning for milliseconds, where ours are to compute.
        torch.set_num_threads(1)
        dispatch.set_threads(threads.most)
        dispatch.set_batch_invariant(is_wanted=settings.batch_invariant)
        if settings.matmul_sums == "float16" and device.type == "cuda":
            dispatch.sum_in_float16()
        with failing_as("loading the model", device):
            model = build(found.blueprint, lambda done: progress(WEIGHTS * done), threads.most)
            model.adapters.room = AdapterRoom(adapter_bytes)
            model.adapters.tokenizer_at = lambda folder, num_tokens: tokenizer_at(
                folder, num_tokens, path, found.shape, tokenizer
            )
            notes += _load_adapters(model.adapters, settings)
            rotary = {name: RotarySets(spec, plan.window, device) for name, spec in plan.rope.items()}
        self.tokenizer: Tokenizer = tokenizer
        self.adapters: AdapterStore
        self.adapters = self._adapters = model.adapters
        self.steps = StepBuilder(plan.rope, plan.window)
        if device.type == "cuda":
            steps = Steps.of(settings, model, rotary, plan.cache_dtype, plan.window)
            with failing_as("compiling kernels", device):
                warm_up(steps, threads.most, lambda done: progress(WEIGHTS + KERNELS * done))
        factors: list[Tensor] = []
        with failing_as("setting up the cache", device):
            if plan.cache_dtype != "f16":  # Before the cache, beside which there may be no room for it.
                over = partial(ModelRunner, model, rotary=rotary, threads=threads)
                factors = key_factors(over, model, tokenizer, self.steps, plan.step_tokens)
            self.runner = ModelRunner(model, _allocate(plan, model), rotary, threads, _scratch(plan, model))
            for cache, factor in zip(self.runner.caches, factors, strict=bool(factors)):
                cache.key_factor.copy_(factor)
        unmovable = why_unmovable(model.layers)
        notes.append(reuse_note(settings.cache.reuse, unmovable))
        self.kv: KVCache
        self.kv = self._pages = PagedKVCache(
            plan.num_pages,
            self.steps.frequencies_at,
            num_window_pages=plan.num_window_pages,
            window=plan.window_tokens,
            moves=settings.cache.reuse == "moved" and unmovable is None,
        )
        self.capabilities = Capabilities(
            settings.max_num_seqs, plan.step_tokens, prompt_rows(found.shape.vocab_size, plan.step_tokens)
        )
        if _can_be_recorded(model, found.shape.num_experts, settings.max_num_seqs):
            begun = WEIGHTS + KERNELS + KEYS
            self.runner.record_decode(
                settings.max_num_seqs, plan.window, lambda done: progress(begun + (1 - begun) * done)
            )
        shares = memory_shares(plan, room, device.type, found.blueprint.host_bytes)
        self.card = replace(_card(found, model, plan, tokenizer, notes), memory=shares)
        self.runs, said = open_store(settings.cache, plan.run_bytes, self, found.files, self._form(plan))
        self._pages.stored = StoredPages(self.runs, self) if self.runs.host_bytes else None
        self.card = replace(self.card, notes=(*self.card.notes, *said))
        progress(1.0)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """See Backend. A step that fails has stored nothing that could be found: only committed tokens are."""
        inputs = self.inputs(chunks)
        self._copy_pages()
        return self.runner.run(inputs)

    def _copy_pages(self) -> None:
        """Make the copies within the cache that its books have promised."""
        for waiting, are_windowed in ((self._pages.copies, False), (self._pages.window_copies, True)):
            while batch := waiting.next():
                if batch.pages:
                    self.runner.copy_pages(batch.pages, are_windowed=are_windowed)
                if len(batch.sources):
                    self.runner.copy_slots(torch.from_numpy(batch.sources), torch.from_numpy(batch.targets))
                waiting.done(batch.count)

    def read_pages(self, numbers: Sequence[int], window_numbers: Sequence[int]) -> Bytes:
        """See PageMover."""
        self._copy_pages()
        return self.runner.read_pages(numbers, window_numbers).numpy()

    def write_pages(
        self, payload: Bytes, shape: tuple[int, int], pages: Sequence[Placed], window_pages: Sequence[Placed]
    ) -> None:
        """See PageMover."""
        self._copy_pages()
        self.runner.write_pages(torch.from_numpy(payload), shape, pages, window_pages)

    def _form(self, plan: HFPlan) -> list[str | bytes]:
        """What tells cached pages from those of the same model under other settings: rotation, formats, key factors."""
        form: list[str | bytes] = ["torch", str(PAGE), repr(plan.window_tokens)]
        for name, spec in sorted(plan.rope.items()):  # Where they depend on a text's length, its own root tells them.
            inv_freq, attention_factor = spec.frequencies(1)
            form += [name, spec.kind, inv_freq.tobytes(), repr(attention_factor)]
        for cache in self.runner.caches:
            form += [repr((cache.format, cache.is_windowed)), cache.key_factor.cpu().numpy().tobytes()]
        return form

    def inputs(self, chunks: Sequence[Chunk]) -> StepInputs:
        """What a runner is sent for these chunks. Raises BackendError for a token that the model doesn't have."""
        inputs = self.steps.build(chunks, self._pages, self._adapters.rows(chunks))
        token_ids = inputs.token_ids.numpy()
        limits = {chunk.adapter: self._adapters.num_tokens(chunk.adapter) for chunk in chunks}
        for adapter, num_tokens in limits.items():
            mine = token_ids
            if len(limits) > 1:
                mine = np.concatenate([chunk.token_ids for chunk in chunks if chunk.adapter == adapter])
            if mine.min() < 0 or mine.max() >= num_tokens:
                raise BackendError(f"an invalid token: ids of this model are 0 to {num_tokens - 1}")
        return inputs

    def variants(self) -> CacheVariants:
        """See SharesWeights."""
        return CacheVariants(self, self.runner, self.steps, self.inputs)

    def close(self) -> None:
        """Let go of weights and cache, once what rests of chats is written."""
        self.runs.close()
        del self.runner, self.adapters, self._adapters


def _load_adapters(adapters: Adapters, settings: ModelSettings) -> list[str]:
    """Put those of the settings in place; returns what a person should know of them. Later ones are logged."""
    notes: list[str] = []
    adapters.announce = notes.append
    for name, path in settings.adapters.items():
        adapters.prepare(name, Path(path).expanduser())()
    adapters.announce = log.warning
    return notes


def _allocate(plan: HFPlan, model: LoadedModel) -> list[LayerCache]:
    """All pages of all layers: on a card within one tensor, as each takes whole megabytes. Raises BackendError."""
    caches: list[LayerCache] = []
    formats = [CacheFormat(plan.cache_dtype, layer.num_kv_heads, layer.head_dim) for layer in model.layers]
    counts = [plan.num_window_pages if is_windowed else plan.num_pages for is_windowed in plan.windowed]
    try:
        memory = None
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # What loading took beside the weights.
            size = sum(count * format.page_bytes for count, format in zip(counts, formats, strict=True))
            memory = torch.empty(size, dtype=torch.uint8, device=model.device)
        for format, num_pages, is_windowed in zip(formats, counts, plan.windowed, strict=True):
            own = None if memory is None else memory[: num_pages * format.page_bytes]
            memory = None if memory is None else memory[num_pages * format.page_bytes :]
            caches.append(LayerCache.allocate(format, num_pages, model.device, is_windowed=is_windowed, memory=own))
    except (RuntimeError, OSError) as error:
        raise BackendError(f"no memory for a cache of {plan.num_pages * PAGE} tokens: {error}") from error
    for cache in caches:
        cache.touch()
    return caches


def _scratch(plan: HFPlan, model: LoadedModel) -> Tensor | None:
    """Where prompts expand a sequence's keys and values; None where nothing is expanded."""
    size = scratch_bytes(model.layers, plan.window)
    if model.device.type != "cuda" or model.activation_dtype == torch.float32 or not size:
        return None
    return torch.empty(size, dtype=torch.uint8, device=model.device)


def _can_be_recorded(model: LoadedModel, num_experts: int, max_num_seqs: int) -> bool:
    """Whether steps can be CUDA graphs: on a GPU, and where no step waits to learn which experts were picked."""
    are_few = batch_size(max_num_seqs) <= dispatch.MOST_STACKED
    return model.device.type == "cuda" and (not num_experts or (are_few and model.picks_experts_on_card))


def _card(
    found: Inspection,
    model: LoadedModel,
    plan: HFPlan,
    tokenizer: NamedTokenizer,
    notes: Sequence[str],
) -> ModelCard:
    shape, templates = found.shape, found.chat_templates
    return ModelCard(
        model_id=found.model_id,
        architecture=shape.model_type,
        format=found.blueprint.format,
        max_model_len=plan.window,
        trained_len=shape.trained_len,
        cache_dtype=plan.cache_dtype,
        chat_template=templates.get(DEFAULT),
        chat_templates=tuple(templates.items()),
        notes=(
            *plan.notes,
            f"kernels: {dispatch.describe(model.device)}",
            *model.notes,
            *notes,
        ),
        cache_token_bytes=plan.token_bytes,
        named_tokens=tokenizer.named_tokens,
    )

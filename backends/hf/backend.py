"""A Hugging Face folder as a Backend: chunks of token ids in, logits out, over our own paged cache."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tightrope.backends.devices.choice import choose_device, describe_card
from tightrope.backends.devices.host import look
from tightrope.backends.errors import BackendError
from tightrope.backends.files.chat_templates import DEFAULT
from tightrope.backends.hf.adapters.token_owners import tokenizer_at
from tightrope.backends.hf.cache.pages import PagedKVCache
from tightrope.backends.hf.cache.stored_pages import Placed, StoredPages
from tightrope.backends.hf.load.inspection import Inspect, Inspection, NamedTokenizer, inspect
from tightrope.backends.hf.load.model import LoadedModel
from tightrope.backends.hf.movable import reuse_note, why_unmovable
from tightrope.backends.hf.plan import HFPlan
from tightrope.backends.hf.ranks.opening import open_part
from tightrope.backends.hf.run.calibrate import key_factors
from tightrope.backends.hf.run.device_errors import failing_as
from tightrope.backends.hf.run.steps import StepBuilder, StepInputs
from tightrope.backends.hf.run.variants import CacheVariants
from tightrope.backends.hf.text.tokenizer import HFTokenizer
from tightrope.backends.memory import prompt_rows
from tightrope.backends.protocol import AdapterStore, Capabilities, Chunk, KVCache, ModelCard, Tokenizer
from tightrope.backends.sessions.opening import check_folder, open_store
from tightrope.backends.sessions.piece import Bytes
from tightrope.backends.settings import ModelSettings
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import PAGE

log = logging.getLogger("tightrope.hf")

SOURCE = "tightrope.backends.hf.load.inspection"
# Shares of the progress: of weights, of kernels, and of the calibration of keys. The rest is recordings of steps.
WEIGHTS, KERNELS, KEYS = 0.9, 0.04, 0.03


class HFBackend:
    """Backend over transformers' module tree with our own modules: books, layouts and words here, the rest in a runner.

    `runner` holds weights and caches, `steps` lays out what it is sent, and `kv` are the books of its pages.
    """

    def __init__(
        self,
        path: Path,
        settings: ModelSettings,
        progress: Callable[[float], None],
        inspect: Inspect = inspect,
        source: str = SOURCE,
    ) -> None:
        """Load what `inspect` finds at `path`, a folder, calling `progress` with the share done.

        source: the module whose `inspect` finds the same in other ranks. Raises BackendError. Files and settings are
        checked, and the memory is planned, before anything large is allocated.
        """
        check_folder(settings.cache)
        host = look()
        device = choose_device(settings.device, host)
        self._part, how = open_part(path, settings, device, inspect, source)
        try:
            cards = [part.device for part in (self._part.own,) if part.device.type == "cuda"]
            self._open(path, settings, [*(f"device: {describe_card(card, host)}" for card in cards), *how], progress)
        except BaseException:
            self._part.close()
            raise

    def _open(self, path: Path, settings: ModelSettings, notes: list[str], progress: Callable[[float], None]) -> None:
        """Plan, load, and set up cache and books. notes: lines of the start so far."""
        part, own = self._part, self._part.own
        found, device, plan = own.found, own.device, own.plan
        notes += found.notes
        tokenizer = found.tokenizer or HFTokenizer(path, found.shape)  # The latter says what the folder lacks.
        part.load(lambda done: progress(WEIGHTS * done))
        model = own.model
        model.adapters.tokenizer_at = lambda folder, num_tokens: tokenizer_at(
            folder, num_tokens, path, found.shape, tokenizer
        )
        notes += own.load_adapters()
        self.tokenizer: Tokenizer = tokenizer
        self._adapters = model.adapters
        self.adapters: AdapterStore = part.adapters
        self.steps = StepBuilder(plan.rope, plan.window)
        part.warm_up(lambda done: progress(WEIGHTS + KERNELS * done))
        factors: list[Tensor] = []
        with failing_as("setting up the cache", device):
            if plan.cache_dtype != "f16":  # Before the cache, beside which there may be no room for it.
                factors = key_factors(part.runner_over, model, tokenizer, self.steps, plan.step_tokens)
            self.runner = part.cached_runner(factors)
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
        if own.can_be_recorded:
            begun = WEIGHTS + KERNELS + KEYS
            self.runner.record_decode(
                settings.max_num_seqs, plan.window, lambda done: progress(begun + (1 - begun) * done)
            )
        self.card = replace(_card(found, model, plan, tokenizer, notes), memory=part.memory)
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
        runner = self.runner
        for cache, format, factor in zip(runner.caches, runner.formats, runner.key_factors, strict=True):
            form += [repr((format, cache.is_windowed)), factor.numpy().tobytes()]
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
        self._part.close()
        del self.runner, self.adapters, self._adapters, self._part


def _card(
    found: Inspection,
    model: LoadedModel,
    plan: HFPlan,
    tokenizer: NamedTokenizer,
    notes: Sequence[str],
) -> ModelCard:
    shape, templates, fault = found.shape, found.chat_templates, dispatch.fault(model.device)
    if fault is not None:
        fault = f"torch computes what C++ would, which takes many times as long: {fault}"
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
        fault=fault,
    )

"""A Hugging Face folder as a Backend: chunks of token ids in, logits out, over our own paged cache."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tightrope.backends.adapters import AdapterRoom
from tightrope.backends.errors import BackendError
from tightrope.backends.files.chat_templates import DEFAULT
from tightrope.backends.files.peft import room_for_adapters
from tightrope.backends.hf.adapters.token_owners import tokenizer_at
from tightrope.backends.hf.cache.pages import PagedKVCache
from tightrope.backends.hf.load.inspection import Inspection, inspect
from tightrope.backends.hf.plan import Plan, check_layers, free_bytes, make_plan
from tightrope.backends.hf.run.calibrate import set_key_factors
from tightrope.backends.hf.run.graphs import DecodeGraphs, batch_size
from tightrope.backends.hf.run.steps import StepBuilder
from tightrope.backends.hf.run.variants import CacheVariants
from tightrope.backends.hf.runner import LoadedModel, build
from tightrope.backends.hf.text.tokenizer import HFTokenizer
from tightrope.backends.memory import prompt_rows
from tightrope.backends.protocol import AdapterStore, Capabilities, Chunk, KVCache, ModelCard, Tokenizer
from tightrope.backends.settings import ModelSettings
from tightrope.backends.threads import compute_threads
from tightrope.kernels import dispatch
from tightrope.kernels.forms.layout import PAGE, CacheFormat, LayerCache

log = logging.getLogger("tightrope.hf")

# Steps of so many tokens give torch all threads; in smaller ones waking them takes longer than the work.
BLAS_TOKENS = 17
LOAD_SHARE = 0.97  # of the progress; the rest is the calibration of keys


class HFBackend:
    """Backend over transformers' module tree with our own modules."""

    def __init__(self, folder: Path, settings: ModelSettings, progress: Callable[[float], None]) -> None:
        """Load `folder`, calling `progress` with the share done.

        Raises BackendError. Files and settings are checked, and the memory is planned, before anything large is
        allocated.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = inspect(folder, settings, device)
        shape, blueprint = found.shape, found.blueprint
        adapter_bytes = room_for_adapters(settings)
        plan = make_plan(settings, shape, blueprint.weight_bytes + adapter_bytes, free_bytes())
        check_layers(plan, blueprint.layers)
        tokenizer = found.tokenizer or HFTokenizer(folder, shape)  # which says what is missing
        self.tokenizer: Tokenizer = tokenizer
        self._threads = compute_threads(settings.threads)
        torch.set_num_threads(1)  # see BLAS_TOKENS
        dispatch.set_threads(self._threads)
        self.model = build(blueprint, lambda done: progress(LOAD_SHARE * done))
        self.steps = StepBuilder(plan.rope, plan.window, device)
        self.adapters: AdapterStore = self.model.adapters
        adapter_notes: list[str] = []
        self.model.adapters.room = AdapterRoom(adapter_bytes)
        self.model.adapters.tokenizer_at = lambda path, num_tokens: tokenizer_at(
            path, num_tokens, folder, shape, self.tokenizer
        )
        self.model.adapters.announce = adapter_notes.append
        for name, path in settings.adapters.items():
            self.adapters.prepare(name, Path(path).expanduser())()
        self.model.adapters.announce = log.warning
        self.caches = self._allocate(plan)
        self.model.attach(self.caches)
        # None: every step runs as it is, as it must on a CPU, and where a step waits to learn which experts run
        self.graphs: DecodeGraphs | None = None
        are_few = batch_size(settings.max_num_seqs) <= dispatch.MOST_STACKED
        if device.type == "cuda" and (not shape.num_experts or (are_few and self.model.picks_experts_on_card)):
            self.graphs = DecodeGraphs(
                self.model.forward,
                settings.max_num_seqs,
                plan.window,
                device,
                has_windows=any(plan.windowed),
            )
        self.kv: KVCache
        self.kv = self._pages = PagedKVCache(
            plan.num_pages,
            self.steps.frequencies_at,
            num_window_pages=plan.num_window_pages,
            window=plan.window_tokens,
        )
        self.capabilities = Capabilities(
            settings.max_num_seqs, plan.step_tokens, prompt_rows(shape.vocab_size, plan.step_tokens)
        )
        self.card = _card(folder, found, self.model, plan, tokenizer, adapter_notes)
        progress(1.0)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """See Backend. A step that fails has stored nothing that could be found: only committed tokens are."""
        token_ids = np.concatenate([np.asarray(chunk.token_ids, np.int64) for chunk in chunks])
        limits = {chunk.adapter: self.model.adapters.num_tokens(chunk.adapter) for chunk in chunks}
        for adapter, num_tokens in limits.items():
            mine = token_ids
            if len(limits) > 1:
                mine = np.concatenate([chunk.token_ids for chunk in chunks if chunk.adapter == adapter])
            if mine.min() < 0 or mine.max() >= num_tokens:
                raise BackendError(f"an invalid token: ids of this model are 0 to {num_tokens - 1}")
        try:
            with torch.inference_mode(), self._blas_threads(len(token_ids)):
                self._copy_pages()
                step, tables = self.steps.build(chunks, self._pages)
                device = self.model.device
                rows = torch.from_numpy(_wanted_rows(chunks)).to(device)
                ids, adapters = torch.from_numpy(token_ids).to(device), self.model.adapters.rows(chunks)
                if self.graphs is None or adapters is not None:
                    logits = self.model.forward(ids, step, tables, rows, adapters).cpu()
                else:
                    logits = self.graphs.forward(ids, step, tables, rows).cpu()
        except RuntimeError as error:  # of torch, running out of memory among them
            reason = str(error).strip().partition("\n")[0]
            raise BackendError(f"the model failed in a step of {len(token_ids)} tokens: {reason}") from error
        return torch.from_numpy(logits.numpy())  # a tensor of inference mode couldn't be changed by the sampler

    def variants(self) -> CacheVariants:
        """See SharesWeights."""
        return CacheVariants(self)

    def close(self) -> None:
        """Let go of weights and cache."""
        del self.model, self.caches, self.graphs, self.adapters

    def _allocate(self, plan: Plan) -> list[LayerCache]:
        """All pages of all layers, with key factors where codes are of few bits."""
        model = self.model
        caches: list[LayerCache] = []
        try:
            for layer, is_windowed in zip(model.layers, plan.windowed, strict=True):
                format = CacheFormat(plan.cache_dtype, layer.num_kv_heads, layer.head_dim)
                num_pages = plan.num_window_pages if is_windowed else plan.num_pages
                caches.append(LayerCache.allocate(format, num_pages, model.device, is_windowed=is_windowed))
        except (RuntimeError, OSError) as error:
            raise BackendError(f"no memory for a cache of {plan.num_pages * PAGE} tokens: {error}") from error
        for cache in caches:
            cache.touch()
        if plan.cache_dtype != "f16":
            with self._blas_threads(plan.step_tokens):
                set_key_factors(model, caches, self.tokenizer, self.steps, plan.step_tokens)
        return caches

    def _copy_pages(self) -> None:
        """Make the copies that the cache's books ask for."""
        for waiting, is_windowed in ((self._pages.copies, False), (self._pages.window_copies, True)):
            caches = [cache for cache in self.caches if cache.is_windowed is is_windowed]
            while copies := waiting.next():
                copy_pages(caches, copies)
                waiting.done(len(copies))

    @contextmanager
    def _blas_threads(self, num_tokens: int) -> Iterator[None]:
        """Let torch compute a large step with all threads; the kernels have threads of their own."""
        if num_tokens < BLAS_TOKENS:
            yield
            return
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)


def copy_pages(caches: Iterable[LayerCache], copies: Sequence[tuple[int, int]]) -> None:
    """Copy pages, (source, target), in every layer; no page is both, or a target twice."""
    sources, targets = (list(pages) for pages in zip(*copies, strict=True))
    for cache in caches:
        for tensor in (cache.key_codes, cache.key_scales, cache.value_codes, cache.value_scales):
            tensor[targets] = tensor[sources]


def _wanted_rows(chunks: Sequence[Chunk]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows of the step whose logits are wanted."""
    parts: list[range] = []
    end = 0
    for chunk in chunks:
        begin, end = end, end + len(chunk.token_ids)
        parts.append(range({"all": begin, "last": end - 1, "none": end}[chunk.want_logits], end))
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def model_id(folder: Path) -> str:
    """What clients call the model: org/name where the hub's cache keeps it, else the folder's name."""
    folder = folder.absolute()
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/")
    return folder.name


def _card(
    folder: Path,
    found: Inspection,
    model: LoadedModel,
    plan: Plan,
    tokenizer: HFTokenizer,
    adapter_notes: Sequence[str],
) -> ModelCard:
    shape, templates = found.shape, found.chat_templates
    return ModelCard(
        model_id=model_id(folder),
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
            *tokenizer.notes,
            *adapter_notes,
        ),
        cache_token_bytes=plan.token_bytes,
        named_tokens=tokenizer.named_tokens,
    )

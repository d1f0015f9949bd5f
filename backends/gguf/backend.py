"""A GGUF model as a Backend: chunks of token ids in, logits out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from torch import Tensor

from tightrope.backends.adapters import AdapterRoom
from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import Header
from tightrope.backends.gguf.adapters import GGUFAdapters, room_for_adapters
from tightrope.backends.gguf.cache import SharedKVCache
from tightrope.backends.gguf.layout import memory_of
from tightrope.backends.gguf.model_file import notes_on, read_model
from tightrope.backends.gguf.native import ModelOptions, NativeContext, NativeModel
from tightrope.backends.gguf.plan import GGUFPlan, context_options, make_plan, memory_shares, without_moves
from tightrope.backends.gguf.shape import ModelShape
from tightrope.backends.gguf.swap_space import ABOUT
from tightrope.backends.gguf.tokenizer import GGUFTokenizer
from tightrope.backends.gguf.values import ValueScan
from tightrope.backends.memory import prompt_rows
from tightrope.backends.protocol import AdapterStore, Capabilities, Chunk, KVCache, ModelCard, Tokenizer
from tightrope.backends.sessions.opening import check_folder, open_store
from tightrope.backends.sessions.store import RunStore
from tightrope.backends.settings import ModelSettings
from tightrope.kernels import dispatch

# In steps of fewer tokens, and of one, ggml's products with some types add up in another order, and its own attention
# does with all. States are cut where checkpoints are made of them, and cards have kernels of their own.
STEADY_TOKENS = 64


class GGUFBackend:
    """Backend over one llama.cpp model and context."""

    def __init__(self, path: Path, settings: ModelSettings, progress: Callable[[float], None]) -> None:
        """Load `path`, calling `progress` with the share done. Raises BackendError, having freed everything."""
        check_folder(settings.cache)
        header = read_model(path, settings)
        adapter_bytes = room_for_adapters(settings, header)
        plan = make_plan(settings, header, memory_of(settings, None, None), adapter_bytes)
        self._runs: RunStore | None = None
        torch.set_num_threads(1)  # Llama.cpp's threads fill the machine; torch's beside them only get in their way.
        with ValueScan(header) as scan:
            self._model = NativeModel(path, _model_options(plan, progress))
            try:
                self._context = NativeContext(self._model, context_options(settings, plan))
            except BackendError:
                self._model.close()
                raise
            try:
                scan.finish()
            except BackendError:
                self.close()
                raise
        if plan.can_move and not self._context.can_move:
            plan = without_moves(plan)
        self._last_logits = np.empty((0, 0), np.float32)
        self._last_rows = torch.from_numpy(self._last_logits)
        self.adapters: AdapterStore
        self.adapters = self._adapters = GGUFAdapters(self._model, self._context, header, AdapterRoom(adapter_bytes))
        try:
            for name, adapter_path in settings.adapters.items():
                self._adapters.prepare(name, Path(adapter_path).expanduser())()
        except BackendError:
            self.close()
            raise
        tokenizer = GGUFTokenizer(self._model)
        is_cut = not (self._model.has_state or self._model.swa_window)
        scratch = self._context.max_seqs - 1 if is_cut else None
        can_be_steady = not self._model.has_state and not plan.layout.num_on_cards
        steady_tokens = STEADY_TOKENS if can_be_steady and plan.step_tokens >= 2 * STEADY_TOKENS else 0
        self.tokenizer: Tokenizer = tokenizer
        self.kv: KVCache
        self.kv = self._cache = SharedKVCache(
            self._context,
            plan.num_cells,
            self._context.max_seqs if scratch is None else scratch,
            swa_window=self._model.swa_window,
            whole_only=self._model.has_state,
            checkpoint_bytes=plan.checkpoint_bytes,
            turn_ends=lambda: tokenizer.eos_ids,
            can_move=plan.can_move,
            scratch=scratch,
            steady_tokens=steady_tokens,
        )
        self.capabilities = Capabilities(
            settings.max_num_seqs,
            plan.step_tokens,
            prompt_rows(ModelShape.of(header).vocab_size, plan.step_tokens),
            mixes_adapters=False,
            steady_tokens=steady_tokens,
        )
        self.card = _card(path, header, self._model, plan, tokenizer, notes_on(settings))
        try:
            files = [file.path for file in header.files]
            self._runs, notes = open_store(settings.cache, plan.run_bytes, self, files, self._form(settings, plan))
        except BackendError:
            self.close()
            raise
        self._cache.swap_to(self._runs)
        self.card = replace(self.card, notes=(*self.card.notes, *notes))

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """See Backend. More rows than one native call may yield are computed in several calls and copied together."""
        self._adapters.apply(chunks)
        ends = self._fill_batch(chunks)
        try:
            return self._run_with_pauses(chunks, ends)
        except BackendError:
            self._cache.forget_uncommitted(chunk.seq_id for chunk in chunks)
            raise

    def close(self) -> None:
        if self._runs is not None:
            self._runs.close()
        self._context.close()
        self._model.close()

    def _form(self, settings: ModelSettings, plan: GGUFPlan) -> tuple[str, ...]:
        """What tells copies of cells from those of the same model under other settings, or of another llama.cpp."""
        options = context_options(settings, plan)
        cache = (options.type_k, options.type_v, options.flash_attention, self._context.has_own_attention)
        rope = (options.rope_scaling_type, options.rope_freq_base, options.rope_freq_scale)
        yarn = (options.yarn_orig_ctx, options.yarn_ext_factor)
        return "llama.cpp", llama_cpp.__version__, repr((cache, rope, yarn, ABOUT.format))

    def _fill_batch(self, chunks: Sequence[Chunk]) -> list[int]:
        """Write the chunks one after another into the native batch; returns where each ends."""
        native = self._context
        ends: list[int] = []
        end = 0
        for chunk in chunks:
            begin, end = end, end + len(chunk.token_ids)
            assert end <= native.batch_tokens, f"a step of more than {native.batch_tokens} tokens"
            native.token_ids[begin:end] = chunk.token_ids
            native.positions[begin:end] = np.arange(chunk.start, chunk.start + end - begin, dtype=np.int32)
            native.slots[begin:end] = self._cache.slot(chunk.seq_id)
            native.outputs[begin:end] = chunk.want_logits == "all"
            if chunk.want_logits == "last":
                native.outputs[end - 1] = 1
            ends.append(end)
        return ends

    def _run_with_pauses(self, chunks: Sequence[Chunk], ends: list[int]) -> Tensor:
        """Run the filled batch, in pieces where the cache has to copy a state in between."""
        parts: list[Tensor] = []
        begin = 0
        for chunk, end in zip(chunks, ends, strict=True):
            stop = chunk.start + len(chunk.token_ids)
            for place in self._cache.pauses(chunk.seq_id, stop):
                parts.append(self._run(begin, end - stop + place).clone())
                begin = end - stop + place
                self._cache.save_paused(chunk.seq_id, chunk.token_ids[: place - chunk.start])
        if begin < (ends[-1] if ends else 0) or not parts:
            parts.append(self._run(begin, ends[-1] if ends else 0))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, begin: int, end: int) -> Tensor:
        """Logits of tokens begin .. end of the batch; the next call may overwrite them."""
        native = self._context
        outputs = native.outputs[begin:end]
        num_rows = int(np.count_nonzero(outputs))
        if begin == end:
            return self._no_rows()
        if num_rows <= native.max_outputs:
            native.decode(begin, end)
            return self._rows(num_rows) if num_rows else self._no_rows()
        rows = begin + np.flatnonzero(outputs)
        parts: list[Tensor] = []
        for group in range(0, num_rows, native.max_outputs):
            is_last = group + native.max_outputs >= num_rows
            stop = end if is_last else int(rows[group + native.max_outputs])
            native.decode(begin, stop)
            parts.append(self._rows(len(rows[group : group + native.max_outputs])).clone())
            begin = stop
        return torch.cat(parts)

    def _rows(self, num_rows: int) -> Tensor:
        """The logits of the last native call [num_rows, V], which the next one overwrites."""
        found = self._context.logits(num_rows)
        if found is not self._last_logits:  # They lie at the same place in most steps.
            self._last_logits, self._last_rows = found, torch.from_numpy(found)
        return self._last_rows

    def _no_rows(self) -> Tensor:
        return torch.empty(0, self._model.vocab_size)


def _model_options(plan: GGUFPlan, progress: Callable[[float], None]) -> ModelOptions:
    """A mapped file that is overwritten or cut takes the process down, so it is read instead where memory allows."""
    layout = plan.layout
    # Rows are split by the numbers of cards, so that those without any keep their places among them.
    splits_rows = layout.has_split_rows and len(layout.memory.cards) > 1
    pairs = zip(layout.memory.cards, plan.on_cards, strict=True) if plan.on_cards else ()
    used = [(card.pointer, count) for card, count in pairs if count or splits_rows]
    return ModelOptions(
        devices=tuple(pointer for pointer, _ in used if pointer is not None),
        layers_on=tuple(count for _, count in used),
        host_tensors=layout.host_tensors,
        splits_rows=splits_rows,
        use_mmap=layout.host_weight_bytes > layout.memory.host_bytes // 2,
        progress=progress,
    )


def _card(
    path: Path,
    header: Header,
    model: NativeModel,
    plan: GGUFPlan,
    tokenizer: GGUFTokenizer,
    setting_notes: tuple[str, ...],
) -> ModelCard:
    shape = ModelShape.of(header)
    default, templates = model.chat_template(), header.chat_templates
    if (fault := dispatch.fault()) is not None:
        fault = f"neither the sampler nor the torch engine has its C++ kernels: {fault}"
    return ModelCard(
        model_id=path.stem,
        architecture=shape.architecture,
        format=f"gguf {model.type_name}, {header.bits_per_weight:.1f} bpw",
        max_model_len=plan.window,
        trained_len=shape.trained_len,
        cache_dtype=plan.cache_type.name,
        chat_template=templates[0][1] if default is None and len(templates) == 1 else default,
        chat_templates=templates,
        notes=plan.notes + setting_notes + header.notes + model.notes,
        named_tokens=tokenizer.named_tokens,
        cache_token_bytes=shape.cache_bytes(plan.cache_type.key_type, plan.cache_type.value_type),
        memory=memory_shares(plan),
        fault=fault,
    )

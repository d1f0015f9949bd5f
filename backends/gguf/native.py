"""A thin, typed layer over llama.cpp's own functions: one model, one context, many sequences.

Everything here is about pointers, callbacks and return codes; what to do with them is decided elsewhere. Every native
callback lives as long as the module or the object that owns it: llama.cpp keeps the pointer, and calling a collected
callback ends the process.
"""

import ctypes
import logging
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as ll

from tightrope.backends.errors import BackendError, OutOfMemory
from tightrope.backends.files.gguf.header import read_header
from tightrope.backends.gguf.large_pages import want_large_pages
from tightrope.backends.gguf.own_attention import open_own_attention, show_graphs
from tightrope.backends.gguf.threadpool import ThreadPools
from tightrope.backends.sharing import Threads

log = logging.getLogger("tightrope.gguf")

MAX_SEQS = 256  # It is llama.cpp's LLAMA_MAX_SEQ.
# ggml's levels: 1 debug, 2 info, 3 warning, 4 error; 5 continues the line before
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.DEBUG, 4: logging.WARNING}

_NO_MEMORY = -2  # llama_decode gives it where a buffer of the step can't be had.
_WARNING = 3
_MAX_NAMED = 4  # A message names so many tensors at most.
_ASKS = "create_tensor: loading tensor "
_MAX_WARNINGS = 1 << 16  # A vocabulary may have one for each token.
# The header's checks say these in better words.
_SAID_BETTER = ("missing pre-tokenizer type", "GENERATION QUALITY", "CONSIDER REGENERATING")
_FUNCTION = re.compile(r"^\w+: ")  # Each line begins with the name of a native function.

_recent_errors: deque[str] = deque(maxlen=4)  # Messages of errors quote what llama.cpp complained about last.
_recent_warnings: deque[str] = deque(maxlen=_MAX_WARNINGS)
_asked_tensors: set[str] = set()  # llama.cpp looked for these names in the last file.
_last_level = logging.DEBUG


@ll.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """llama.cpp's errors go to WARNING, all else to DEBUG: hundreds of lines a start, most warnings about our settings.

    Warnings are kept as well, for `NativeModel.notes`: those about a person's file reach the lines of the start.
    """
    global _last_level
    _last_level = _LOG_LEVELS.get(level, _last_level)
    line = "".join(c if c.isprintable() else "\ufffd" for c in text.decode("utf-8", errors="replace").strip())
    if not line.strip("."):
        return
    if _last_level == logging.WARNING:
        _recent_errors.append(line)
    if level == _WARNING:
        _recent_warnings.append(line)
    if line.startswith(_ASKS):
        _asked_tensors.add(line.removeprefix(_ASKS))
    log.log(_last_level, "%s", line)


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """What a context is made with; zero and None leave a rope value as the file has it."""

    num_cells: int
    max_seqs: int
    batch_tokens: int
    ubatch_tokens: int
    max_outputs: int
    threads: int
    type_k: int
    type_v: int
    flash_attention: bool
    own_attention: bool = False  # where this machine has a kernel for it
    offload_cache: bool = False
    rope_scaling_type: int | None = None
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    yarn_orig_ctx: int = 0
    yarn_ext_factor: float | None = None


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How weights are loaded.

    The last layers, with the output as the very last, go to `devices`, which are ggml's; `layers_on` gives each so
    many, in order. All others stay in the host's memory, and so do tensors that the regular expression names.
    """

    devices: tuple[int, ...] = ()
    layers_on: tuple[int, ...] = ()
    host_tensors: str | None = None
    splits_rows: bool = False  # The devices share each matrix by rows, in the proportions of `layers_on`.
    use_mmap: bool = False
    is_vocabulary: bool = False  # Nothing is loaded but the vocabulary, and no tensor is looked at.
    has_weights: bool = True  # Without them a model only says whether, and how, it could be loaded.
    is_for_chats: bool = True  # A model that doesn't write text from left to right is refused.
    progress: Callable[[float], None] = field(default=lambda _: None)


def _complaints() -> str:
    texts = [_FUNCTION.sub("", line).removeprefix("error loading model: ") for line in _recent_errors]
    _recent_errors.clear()
    reasons = [text for text in dict.fromkeys(texts) if text != "failed to load model"]
    return "; ".join(reasons) or "it gave no reason"


def _why_not_loaded(path: Path) -> str:
    """llama.cpp's complaint about a file. Where it only counts tensors, those that it did not look for are named."""
    reason = _complaints()
    if "wrong number of tensors" not in reason:
        return reason
    names = [repr(tensor.name) for tensor in read_header(path).tensors if tensor.name not in _asked_tensors]
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{reason}; its architecture has no {', '.join(names[:_MAX_NAMED])}{more}"


def _warnings() -> tuple[str, ...]:
    """What llama.cpp warned of, a line for each kind: lines that differ in numbers and quoted texts are one kind."""
    kinds: dict[str, list[str]] = {}
    for line in _recent_warnings:
        text = " ".join(_FUNCTION.sub("", line).strip("* ").split())
        if text and not text.startswith(_SAID_BETTER):
            kinds.setdefault(re.sub(r"'.*?'|\d+", "", text), []).append(text)
    _recent_warnings.clear()
    more = "; {} more lines are like this one"
    return tuple(f"llama.cpp: {texts[0]}{more.format(len(texts) - 1) if texts[1:] else ''}" for texts in kinds.values())


class NativeModel:
    """Weights and vocabulary."""

    def __init__(self, path: Path, options: ModelOptions) -> None:
        """Raises BackendError when llama.cpp refuses the file, or its model isn't made for chats and has to be."""
        ll.llama_backend_init()
        ll.llama_log_set(_on_log, ctypes.c_void_p(0))  # Llama_cpp set its own when it was imported.
        _recent_errors.clear()
        _recent_warnings.clear()
        _asked_tensors.clear()
        self._on_progress = ll.llama_progress_callback(_progress_callback(options.progress))
        params = ll.llama_model_default_params()
        kept = _place(params, options)
        params.load_mode = ll.LLAMA_LOAD_MODE_MMAP if options.use_mmap else ll.LLAMA_LOAD_MODE_NONE
        params.progress_callback = self._on_progress
        params.no_alloc = not options.has_weights
        params.vocab_only = options.is_vocabulary
        self.pointer = ll.llama_model_load_from_file(str(path).encode(), params)
        del kept
        if not self.pointer:
            raise BackendError(f"{path}: llama.cpp can't load it: {_why_not_loaded(path)}")
        if options.is_for_chats and not self._writes_text():
            self.close()
            raise BackendError(f"{path}: no model to chat with: its architecture doesn't write text from left to right")
        self.notes = _warnings()  # llama.cpp finds these odd about the file.
        self.vocab = ll.llama_model_get_vocab(self.pointer)
        self.vocab_size: int = ll.llama_vocab_n_tokens(self.vocab)
        self.swa_window: int = ll.llama_model_n_swa(self.pointer)  # It is 0 where every layer sees everything.
        self.has_state = bool(ll.llama_model_is_recurrent(self.pointer) or ll.llama_model_is_hybrid(self.pointer))
        self.type_name = (ll.llama_ftype_name(ll.llama_model_ftype(self.pointer)) or b"mixed").decode()

    def _writes_text(self) -> bool:
        model = self.pointer
        return bool(ll.llama_model_has_decoder(model)) and not (
            ll.llama_model_has_encoder(model) or ll.llama_model_is_diffusion(model)
        )

    def chat_template(self) -> str | None:
        """The file's default chat template, Jinja source."""
        template = ll.llama_model_chat_template(self.pointer, None)
        return template.decode("utf-8", errors="replace") if template is not None else None

    def close(self) -> None:
        if self.pointer:
            ll.llama_model_free(self.pointer)
            self.pointer = None


class _HostTensors(ctypes.Structure):
    """llama_model_tensor_buft_override of llama.h: which tensors go to which kind of buffer."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def _place(params: Any, options: ModelOptions) -> tuple[object, ...]:  # noqa: ANN401 - an untyped structure
    """Say where layers go. Returns what must live until the model is loaded: llama.cpp is given pointers to it.

    A list of devices is always given: without one, llama.cpp takes memory of all cards, also for no layers at all.
    """
    devices = (ctypes.c_void_p * (len(options.devices) + 1))(*options.devices, None)
    split = (ctypes.c_float * ll.llama_max_devices())(*options.layers_on)
    ll._lib.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    pattern = options.host_tensors.encode() if options.host_tensors else None
    overrides = (_HostTensors * 2)(_HostTensors(pattern, ll._lib.ggml_backend_cpu_buffer_type()), _HostTensors())
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    params.n_gpu_layers = sum(options.layers_on)
    params.split_mode = ll.LLAMA_SPLIT_MODE_ROW if options.splits_rows else ll.LLAMA_SPLIT_MODE_LAYER
    params.tensor_split = ctypes.cast(split, ctypes.POINTER(ctypes.c_float))
    if pattern is not None:
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    return devices, split, overrides


class NativeAdapter:
    """A LoRA adapter beside a model's weights; it goes with the model at the latest."""

    def __init__(self, model: NativeModel, path: Path) -> None:
        """Raises BackendError when llama.cpp refuses the file. Not to be called while a step runs."""
        _recent_errors.clear()
        self.pointer = ll.llama_adapter_lora_init(model.pointer, str(path).encode())
        if not self.pointer:
            raise BackendError(f"{path}: llama.cpp can't load it: {_complaints()}")

    def close(self) -> None:
        """Free it. No context may apply it any more."""
        ll.llama_adapter_lora_free(self.pointer)


def _progress_callback(progress: Callable[[float], None]) -> Callable[[float, Any], bool]:
    has_begun = False

    def on_progress(share: float, _: Any) -> bool:  # noqa: ANN401 - a native pointer that nobody looks at
        nonlocal has_begun
        if not has_begun:  # The weights have their place now, and none has been read.
            has_begun = True
            want_large_pages()
        progress(min(1.0, max(0.0, share)))
        return True

    return on_progress


class NativeContext:
    """Cache, compute buffers and one reusable batch of up to `batch_tokens` tokens."""

    def __init__(self, model: NativeModel, options: ContextOptions) -> None:
        """Raises BackendError when llama.cpp can't make it, mostly for want of memory."""
        _recent_errors.clear()
        params = _context_params(options)
        self._attention = open_own_attention(has_windows=model.swa_window > 0) if options.own_attention else None
        if self._attention is not None:
            show_graphs(params, self._attention)
        self.pointer = ll.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            if self._attention is not None:
                self._attention.close()
            raise BackendError(f"llama.cpp can't set up a cache of {options.num_cells} tokens: {_complaints()}")
        self._pools = ThreadPools(self.pointer, options.threads)
        self._threads = Threads(options.threads, self.set_threads)
        self._memory = ll.llama_get_memory(self.pointer)
        self.can_move = bool(ll.llama_memory_can_shift(self._memory))
        self._vocab_size = model.vocab_size
        self.num_cells: int = ll.llama_n_ctx(self.pointer)
        self.max_seqs: int = ll.llama_n_seq_max(self.pointer)
        self.batch_tokens: int = ll.llama_n_batch(self.pointer)
        self.max_outputs = options.max_outputs
        self._logits, self._logits_place = np.empty((0, 0), np.float32), (0, 0)
        self._make_batch(self.batch_tokens)

    @property
    def has_own_attention(self) -> bool:
        """Whether steps use our attention, whose bits are not those of ggml's."""
        return self._attention is not None

    def _make_batch(self, size: int) -> None:
        """Arrays that numpy writes and llama.cpp reads; each token belongs to exactly one sequence."""
        self.token_ids = np.zeros(size, np.int32)
        self.positions = np.zeros(size, np.int32)
        self.slots = np.zeros(size, np.int32)
        self.outputs = np.zeros(size, np.int8)
        self._slot_counts = np.ones(size, np.int32)
        self._slot_pointers = self.slots.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        self._whole_batch = self._batch_from(0)  # Nearly all steps begin there.

    def _batch_from(self, begin: int) -> Any:  # noqa: ANN401 - a structure of an untyped package
        return ll.llama_batch(
            token=_at(self.token_ids, begin, ctypes.c_int32),
            embd=None,
            pos=_at(self.positions, begin, ctypes.c_int32),
            n_seq_id=_at(self._slot_counts, begin, ctypes.c_int32),
            seq_id=_at(self._slot_pointers, begin, ctypes.POINTER(ctypes.c_int32)),
            logits=_at(self.outputs, begin, ctypes.c_int8),
        )

    def decode(self, begin: int, end: int) -> None:
        """Run tokens begin .. end of the batch arrays. Releases the GIL.

        Raises BackendError, naming the reason: OutOfMemory where the step needs more than there is.
        """
        batch = self._batch_from(begin) if begin else self._whole_batch
        batch.n_tokens = end - begin
        _recent_errors.clear()
        self._threads.settle()
        status = ll.llama_decode(self.pointer, batch)
        if status == 1:
            raise BackendError(f"the cache has no room for {end - begin} more tokens")
        if status == _NO_MEMORY:
            raise OutOfMemory(f"out of memory in a step of {end - begin} tokens: {_complaints()}")
        if status != 0:
            raise BackendError(f"llama.cpp failed to run {end - begin} tokens (status {status}): {_complaints()}")

    def set_threads(self, count: int) -> None:
        """Compute with so many threads from the next step on, of those that the context was made with."""
        ll.llama_set_n_threads(self.pointer, count, count)
        self._pools.use(count)

    def apply(self, adapter: NativeAdapter | None, scale: float) -> None:
        """Add `scale` times an adapter in all steps from now on, or none. A change makes the next step plan anew."""
        adapters = (ll.llama_adapter_lora_p_ctypes * 1)(*([] if adapter is None else [adapter.pointer]))
        num_adapters = 0 if adapter is None else 1
        ll.llama_set_adapters_lora(self.pointer, adapters, num_adapters, (ctypes.c_float * 1)(scale))

    def logits(self, num_rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[num_rows, V] float32 of the last `decode`, in batch order; a view that the next one overwrites."""
        first = ll.llama_get_logits(self.pointer)
        place = ctypes.addressof(first.contents), num_rows
        if place != self._logits_place:  # To describe memory to numpy takes longer than to draw a token from it.
            self._logits_place = place
            self._logits = np.ctypeslib.as_array(first, shape=(num_rows, self._vocab_size))
        return self._logits

    def copy_cells(self, source: int, target: int, num_tokens: int, start: int = 0) -> None:
        """Let sequence slot `target` share tokens start .. num_tokens of slot `source`; moves no data."""
        ll.llama_memory_seq_cp(self._memory, source, target, start, num_tokens)

    def remove_cells(self, slot: int, start: int) -> bool:
        """Forget the tokens of a slot from position `start` on; False if the model's state can't be rolled back."""
        return bool(ll.llama_memory_seq_rm(self._memory, slot, start, -1))

    def move_cells(self, slot: int, source: int, target: int) -> None:
        """Forget tokens target .. source of a slot, and let those from `source` on stand from position `target` on.

        A cell moves for all slots that share it. The next step rotates its key; a copy taken before holds the old one.
        """
        ll.llama_memory_seq_rm(self._memory, slot, target, source)
        ll.llama_memory_seq_add(self._memory, slot, source, -1, target - source)

    def first_position(self, slot: int) -> int:
        """The first position that is still stored for a slot; -1 when it is empty."""
        return int(ll.llama_memory_seq_pos_min(self._memory, slot))

    def last_position(self, slot: int) -> int:
        """The last position that is stored for a slot; -1 when it is empty."""
        return int(ll.llama_memory_seq_pos_max(self._memory, slot))

    def saved_bytes(self, slot: int) -> int:
        """Size of a copy of a slot's cells."""
        return int(ll.llama_state_seq_get_size(self.pointer, slot))

    def save_cells(self, slot: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A copy of a slot's cells, for `load_cells`."""
        saved = np.empty(self.saved_bytes(slot), np.uint8)
        written = ll.llama_state_seq_get_data(self.pointer, _at(saved, 0, ctypes.c_uint8), saved.nbytes, slot)
        return saved[:written]

    def load_cells(self, slot: int, saved: np.ndarray[Any, np.dtype[np.uint8]]) -> bool:
        """Put a copy into an empty slot; False if there is no room for it."""
        return bool(ll.llama_state_seq_set_data(self.pointer, _at(saved, 0, ctypes.c_uint8), saved.nbytes, slot))

    def state_bytes(self, slot: int) -> int:
        """Size of a copy of what can't be trimmed: see `save_state`."""
        return int(ll.llama_state_seq_get_size_ext(self.pointer, slot, ll.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY))

    def save_state(self, slot: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A copy of a slot's recurrent states, and of what sliding layers still look at, for `load_state`."""
        flags = ll.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        saved = np.empty(self.state_bytes(slot), np.uint8)
        at = _at(saved, 0, ctypes.c_uint8)
        return saved[: ll.llama_state_seq_get_data_ext(self.pointer, at, saved.nbytes, slot, flags)]

    def load_state(self, slot: int, saved: np.ndarray[Any, np.dtype[np.uint8]]) -> bool:
        """Put a copy in the place of a slot's own; False if there is no room for it, and the slot may then be spoilt.

        The cells of other layers, which the slot must have, stay as they are.
        """
        flags = ll.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        at = _at(saved, 0, ctypes.c_uint8)
        return bool(ll.llama_state_seq_set_data_ext(self.pointer, at, saved.nbytes, slot, flags))

    def close(self) -> None:
        if self.pointer:
            ll.llama_free(self.pointer)
            self.pointer = None
            self._pools.close()
            if self._attention is not None:
                self._attention.close()


def _at(array: np.ndarray[Any, Any], index: int, kind: type[Any]) -> Any:  # noqa: ANN401 - ctypes has no name for it
    return ctypes.cast(array.ctypes.data + index * array.itemsize, ctypes.POINTER(kind))


def _context_params(options: ContextOptions) -> Any:  # noqa: ANN401 - a structure of an untyped package
    params = ll.llama_context_default_params()
    params.n_ctx = options.num_cells
    # llama.cpp measures its buffers with a token and an output for every sequence, and aborts if that is not allowed
    params.n_batch = max(options.batch_tokens, options.max_seqs)
    params.n_ubatch = max(options.ubatch_tokens, options.max_seqs)
    params.n_seq_max = options.max_seqs
    params.n_outputs_max = max(options.max_outputs, options.max_seqs)
    params.n_threads = params.n_threads_batch = options.threads
    params.type_k, params.type_v = options.type_k, options.type_v
    params.flash_attn_type = (
        ll.LLAMA_FLASH_ATTN_TYPE_ENABLED if options.flash_attention else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.offload_kqv = options.offload_cache
    params.kv_unified = True
    params.swa_full = True  # A sliding-window model keeps all tokens, so that any prefix can be reused.
    params.no_perf = True
    params.rope_freq_base = options.rope_freq_base
    params.rope_freq_scale = options.rope_freq_scale
    params.yarn_orig_ctx = options.yarn_orig_ctx
    if options.rope_scaling_type is not None:
        params.rope_scaling_type = options.rope_scaling_type
    if options.yarn_ext_factor is not None:
        params.yarn_ext_factor = options.yarn_ext_factor
    return params

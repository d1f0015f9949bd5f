"""GGUF files that embed or rank, through llama.cpp.

A text is run at a time: on a processor one of some dozen tokens fills its units, texts side by side would attend each
other's places, and what a vector is doesn't depend on its neighbours.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp as ll

from tightrope.backends.embedding.card import Cut, EmbedderCard
from tightrope.backends.embedding.gguf_file import VectorFile
from tightrope.backends.embedding.protocol import Rows, Tokens, checked_length
from tightrope.backends.errors import BackendError
from tightrope.backends.gguf.native import ModelOptions, NativeModel
from tightrope.backends.sharing import Threads

_QUERY, _DOCUMENT = "{query}", "{document}"  # The template of a reranker that was made of a chat model has these.
_LEAST_PROBABILITY = 1e-7  # Where llama.cpp gives a probability, its logit is wanted, which has to be finite.


class GGUFEmbedder:
    """An Embedder over one llama.cpp model and context."""

    def __init__(self, path: Path, max_tokens: int, threads: int) -> None:
        """Raises BackendError in one line for a file that neither embeds nor ranks, or can't be loaded."""
        file = VectorFile.read(path, max_tokens)
        self._model = NativeModel(path, ModelOptions(is_for_chats=False))
        try:
            self._context = _Context(self._model, file, threads)
            self._threads = Threads(threads)
            self._around = _Around(self._model, file)
        except BackendError:
            self._model.close()
            raise
        self._is_probability = file.gives_probability
        self.card = EmbedderCard(
            model_id=path.stem,
            kind=file.kind,
            architecture=file.shape.architecture,
            format=f"gguf {self._model.type_name}, {file.header.bits_per_weight:.1f} bpw",
            dimensions=self._context.width if file.kind == "embedding" else 1,
            max_tokens=file.max_tokens,
            vocab_size=self._model.vocab_size,
            is_nested=file.is_nested,
            notes=self._model.notes,
        )

    def encode(self, text: str, query: str | None, cut: Cut) -> Tokens:
        """See Embedder."""
        before, after = self._around.one if query is None else self._around.pair(query)
        body = self._around.ids_of(text)
        surplus = checked_length(len(before) + len(body) + len(after), self.card.max_tokens, cut)
        if surplus > len(body):  # The query alone fills the window.
            checked_length(len(before) + len(after), self.card.max_tokens, "no")
        body = body[surplus:] if cut == "start" else body[: len(body) - surplus]
        return Tokens([*before, *body, *after])

    def run(self, texts: Sequence[Tokens], threads: int) -> Rows:
        """See Embedder. Fewer threads run where others need the machine: they would wait for each other."""
        rows = np.stack([self._context.run(text.ids, min(threads, self._threads.settle())) for text in texts])
        if not self._is_probability:
            return rows
        yes = np.clip(rows[:, :1].astype(np.float64), _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
        return (np.log(yes) - np.log1p(-yes)).astype(np.float32)

    def close(self) -> None:
        self._context.close()
        self._model.close()


class _Context:
    """Buffers for one text of up to `file.max_tokens` tokens, which is run in one piece: its tokens see each other."""

    def __init__(self, model: NativeModel, file: VectorFile, threads: int) -> None:
        params = ll.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max = file.max_tokens
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.pooling_type = file.pooling
        params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.no_perf = True
        self.pointer = ll.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise BackendError(f"{file.header.path}: llama.cpp can't set up a text of {file.max_tokens} tokens")
        self.width = int(ll.llama_model_n_embd_out(model.pointer))
        self._row = 1 if file.kind == "reranking" else self.width
        self._memory = ll.llama_get_memory(self.pointer)
        self._batch = ll.llama_batch_init(file.max_tokens, 0, 1)

    def run(self, token_ids: Sequence[int], threads: int) -> Rows:
        """[D] float32, a copy. Raises BackendError."""
        ll.llama_set_n_threads(self.pointer, threads, threads)
        batch = self._batch
        batch.n_tokens = len(token_ids)
        for place, token_id in enumerate(token_ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token_id, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if self._memory:
            ll.llama_memory_clear(self._memory, True)
            status = ll.llama_decode(self.pointer, batch)
        else:
            status = ll.llama_encode(self.pointer, batch)
        found = ll.llama_get_embeddings_seq(self.pointer, 0) if status == 0 else None
        if not found:
            raise BackendError(f"llama.cpp failed to run a text of {len(token_ids)} tokens (status {status})")
        return np.ctypeslib.as_array(found, shape=(self._row,)).copy()

    def close(self) -> None:
        if self.pointer:
            ll.llama_batch_free(self._batch)
            ll.llama_free(self.pointer)
            self.pointer = None


class _Around:
    """The tokens that stand around texts, as the file's vocabulary has them."""

    def __init__(self, model: NativeModel, file: VectorFile) -> None:
        self._vocab = model.vocab
        bare, whole = self.ids_of("a"), self._tokenize(b"a", add_special=True)
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.one = whole[:start], whole[start + len(bare) :]
        template = ll.llama_model_chat_template(model.pointer, b"rerank")
        self._template = None if template is None else template.decode("utf-8", "replace")
        if file.kind == "reranking" and self._template is not None:
            is_whole = self._template.count(_QUERY) == self._template.count(_DOCUMENT) == 1
            if not is_whole or self._template.index(_QUERY) > self._template.index(_DOCUMENT):
                raise BackendError(
                    f"{file.header.path}: tokenizer.chat_template.rerank must hold {_QUERY} once, then {_DOCUMENT} once"
                )

    def ids_of(self, text: str) -> list[int]:
        return self._tokenize(text.encode("utf-8", "replace"))

    def pair(self, query: str) -> tuple[list[int], list[int]]:
        """What stands before and behind a text that is scored against the query."""
        if self._template is not None:
            before, rest = self._template.split(_QUERY)
            between, after = rest.split(_DOCUMENT)
            marks = [self._tokenize(part.encode(), parse_special=True) for part in (before, between, after)]
            return [*marks[0], *self.ids_of(query), *marks[1]], marks[2]
        start, end = self.one
        between = end
        if ll.llama_vocab_type(self._vocab) != ll.LLAMA_VOCAB_TYPE_WPM:  # BERT's one mark between the two is its end.
            sep = ll.llama_vocab_sep(self._vocab)
            between = [*end, *([sep] if sep >= 0 and ll.llama_vocab_get_add_sep(self._vocab) else [])]
        return [*start, *self.ids_of(query), *between], end

    def _tokenize(self, raw: bytes, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        room = len(raw) + 8
        while True:
            out = (ctypes.c_int32 * room)()
            count = ll.llama_tokenize(self._vocab, raw, len(raw), out, room, add_special, parse_special)
            if count >= 0:
                return out[:count]
            room = -count

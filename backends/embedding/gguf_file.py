"""What the header of a GGUF file tells of a model that embeds or ranks, and what it takes."""

from dataclasses import dataclass
from pathlib import Path

from tightrope.backends.embedding.card import Kind
from tightrope.backends.errors import BackendError
from tightrope.backends.files.gguf.header import Header, read_header
from tightrope.backends.files.gguf.vocabulary import TOKENS
from tightrope.backends.gguf.shape import ModelShape

POOLING = (1, 2, 3, 4)  # As llama.h has them: mean, cls, last, rank.
MEAN, RANK = 1, 4
# Families of which all published models were trained so that the first numbers of a vector are one by themselves.
# Sources: the model cards of EmbeddingGemma and Qwen3-Embedding.
NESTED = frozenset({"gemma-embedding", "qwen3"})
_ENTRY_BYTES = 180  # A token of the vocabulary takes so much, measured with 30,522 and 120,078 of them.
_TYPES = "token_types.weight"


@dataclass(frozen=True, slots=True)
class VectorFile:
    """A checked header. max_tokens: of a text, as asked for or as the model was trained for, whichever is less."""

    header: Header
    shape: ModelShape
    kind: Kind
    pooling: int  # One of POOLING.
    max_tokens: int

    @classmethod
    def read(cls, path: Path, max_tokens: int) -> "VectorFile":
        """Raises BackendError in one line with the file's name, for all that a header shows to be wrong."""
        header = read_header(path)
        architecture = header.metadata.get("general.architecture")
        shape = ModelShape.of(header)
        if TOKENS not in header.metadata:
            raise BackendError(f"{path}: it holds no vocabulary ({TOKENS}); convert the model anew")
        pooling = header.metadata.get(f"{architecture}.pooling_type", 0)
        if pooling == 0 and header.metadata.get(f"{architecture}.attention.causal") is False:
            pooling = MEAN  # It reads a text as a whole, so it is made for this.
        if not isinstance(pooling, int) or pooling not in POOLING:
            raise BackendError(
                f"{path}: it makes no vectors of texts ({architecture}.pooling_type is {pooling!r}); name it with "
                "--model, or give an embedding or reranking model"
            )
        kind: Kind = "reranking" if pooling == RANK else "embedding"
        file = cls(header, shape, kind, pooling, min(max_tokens, shape.trained_len))
        file._check_ranks()
        return file

    @property
    def is_nested(self) -> bool:
        return self.kind == "embedding" and self.shape.architecture in NESTED

    @property
    def gives_probability(self) -> bool:
        """llama.cpp gives the probability of "yes" for rerankers that were chat models, not a logit."""
        return self.kind == "reranking" and self.shape.architecture == "qwen3"

    @property
    def workspace_bytes(self) -> int:
        """What llama.cpp holds for a text: values of a layer, one layer's weights of attention, and its cache.

        Beside them are logits of all tokens, which nobody asks for, and the vocabulary.
        """
        attention = 4 * self.shape.num_heads * self.max_tokens
        cached = self.shape.cache_bytes(1, 1) if self.header.metadata.get(self._causal, True) else 0
        logits = 4 * self.shape.vocab_size
        per_token = 4 * self.shape.step_width + attention + cached + logits
        return int(self.max_tokens * per_token) + _ENTRY_BYTES * self.shape.vocab_size

    @property
    def _causal(self) -> str:
        return f"{self.shape.architecture}.attention.causal"

    def _check_ranks(self) -> None:
        """Raises BackendError for a classifier of several labels, and where llama.cpp computes something else."""
        if self.kind == "embedding":
            return
        path = self.header.path
        labels = self.header.metadata.get(f"{self.shape.architecture}.classifier.output_labels", ())
        if isinstance(labels, tuple) and len(labels) > 1 and not self.gives_probability:
            raise BackendError(f"{path}: it tells {len(labels)} labels apart; a reranker has one")
        if any(tensor.name == _TYPES and tensor.dims[1:] > (1,) for tensor in self.header.tensors):
            raise BackendError(
                f"{path}: it tells a query from a text by types of tokens, which llama.cpp does not give; name the "
                "model's folder of safetensors instead"
            )

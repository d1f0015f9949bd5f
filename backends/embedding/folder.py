"""Folders of safetensors that embed or rank, as transformers' own classes compute them, in float32 on the processor.

Texts of about one length are run side by side. No code of a model is run, and nothing is read but JSON, safetensors and
vocabularies.
"""

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging

from tightrope.backends.embedding.card import Cut, EmbedderCard
from tightrope.backends.embedding.folder_files import VectorFolder
from tightrope.backends.embedding.modules import read_dense
from tightrope.backends.embedding.pooling import pool
from tightrope.backends.embedding.protocol import Rows, Tokens, checked_length
from tightrope.backends.errors import BackendError

_HEADS = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids")  # A text's vector is made without these.
_UNSTATED = "pooling: the folder has no modules.json, so a vector is the mean of its tokens' states"
_LEAST_WIDTH = 32  # Texts of up to so many tokens are padded to one length without asking.


class FolderEmbedder:
    """An Embedder over a module tree of transformers."""

    def __init__(self, path: Path, max_tokens: int, threads: int) -> None:
        """Raises BackendError in one line for a folder that neither embeds nor ranks, or can't be loaded."""
        folder = VectorFolder.read(path, max_tokens)
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._folder = folder
        self._is_ranking = folder.kind == "reranking"
        self._model = _load(folder)
        self._tokenizer, has_types = _tokenizer(folder)
        self._has_types = has_types and "token_type_ids" in signature(self._model.forward).parameters
        dense = [read_dense(part) for part in folder.recipe.dense]
        self._dense = [(layer, getattr(nn, layer.activation)()) for layer in dense]
        width = int(self._model.config.hidden_size) * len(folder.recipe.pooling)
        self.card = EmbedderCard(
            model_id=path.name,
            kind=folder.kind,
            architecture=folder.architecture,
            format="safetensors, in float32",
            dimensions=1 if self._is_ranking else (len(dense[-1].weight) if dense else width),
            max_tokens=folder.max_tokens,
            vocab_size=int(self._model.config.vocab_size),
            is_nested=not self._is_ranking and folder.is_nested,
            prompts=dict(folder.recipe.prompts or {}),
            default_prompt=folder.recipe.default_prompt,
            notes=() if folder.recipe.is_stated or self._is_ranking else (_UNSTATED,),
        )

    def encode(self, text: str, query: str | None, cut: Cut) -> Tokens:
        """See Embedder."""
        pair = [text] if query is None else [query, text]
        if self._folder.recipe.is_lower_case:
            pair = [part.lower() for part in pair]
        found = self._encoded(pair)
        if checked_length(len(found.ids), self.card.max_tokens, cut):
            found = self._cut(pair, "left" if cut == "start" else "right")
        return Tokens(found.ids, found.type_ids)

    def _encoded(self, pair: Sequence[str]) -> Encoding:
        return self._tokenizer.encode(pair[0], pair[1] if len(pair) == 2 else None)

    def _cut(self, pair: Sequence[str], direction: str) -> Encoding:
        most = self.card.max_tokens
        if len(pair) == 2:  # The query stays whole.
            checked_length(len(self._encoded([pair[0], ""]).ids), most, "no")
        strategy = "longest_first" if len(pair) == 1 else "only_second"
        self._tokenizer.enable_truncation(most, strategy=strategy, direction=direction)
        try:
            return self._encoded(pair)
        finally:
            self._tokenizer.no_truncation()

    def run(self, texts: Sequence[Tokens], threads: int) -> Rows:
        """See Embedder."""
        torch.set_num_threads(threads)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place].ids))
        rows: list[Tensor] = []
        for group in _groups([len(texts[place].ids) for place in order], self.card.max_tokens):
            rows.append(self._run([texts[place] for place in order[group]]))
        made = torch.cat(rows)
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return made[back].numpy()

    @torch.inference_mode()
    def _run(self, texts: Sequence[Tokens]) -> Tensor:
        """[B, D] float32 of texts of about one length."""
        lengths = [len(text.ids) for text in texts]
        ids = torch.zeros(len(texts), max(lengths), dtype=torch.long)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : lengths[row]] = torch.tensor(text.ids)
            mask[row, : lengths[row]] = 1
            if text.type_ids is not None:
                types[row, : lengths[row]] = torch.tensor(text.type_ids)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._has_types:
            inputs["token_type_ids"] = types
        if self._is_ranking:
            logits: Tensor = self._model(**inputs).logits[:, :1].float()
            return logits
        made = pool(self._model(**inputs).last_hidden_state.float(), lengths, self._folder.recipe.pooling)
        for layer, activation in self._dense:
            made = activation(nn.functional.linear(made, layer.weight, layer.bias))
        return made

    def close(self) -> None:
        """Nothing is held that the process' end doesn't free."""


def _groups(lengths: Sequence[int], max_tokens: int) -> list[slice]:
    """Slices of sorted lengths: each is padded to its longest by a quarter at most, and holds about `max_tokens`."""
    groups: list[slice] = []
    begin = 0
    for end in range(1, len(lengths) + 1):
        is_last = end == len(lengths)
        if not is_last:
            longest = lengths[end]
            is_near = longest <= max(_LEAST_WIDTH, lengths[begin] * 5 // 4)
            if is_near and longest * (end + 1 - begin) <= max(max_tokens, longest):
                continue
        groups.append(slice(begin, end))
        begin = end
    return groups


def _load(folder: VectorFolder) -> Any:  # noqa: ANN401 - a class of transformers that its config names
    """The model in evaluation mode, all of its weights read. Raises BackendError."""
    auto: Any = AutoModelForSequenceClassification if folder.kind == "reranking" else AutoModel
    where = folder.recipe.transformer
    try:
        model, loaded = auto.from_pretrained(
            where,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # Whatever a damaged or unknown folder makes a large library raise.
        reason = " ".join(str(error).split())
        raise BackendError(f"{where}: transformers can't load it: {reason:.300}") from None
    missing = sorted(name for name in loaded["missing_keys"] if not name.startswith(_HEADS))
    wrong = [*missing, *sorted(str(key) for key in loaded["mismatched_keys"])]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise BackendError(
            f"{where}: tensor {wrong[0]!s:.80}{more} is missing, or of another shape than config.json says"
        )
    for weight in model.parameters():
        weight.data = weight.data.clone()  # A mapped file that is cut or overwritten would take the process down.
    return model.eval()


def _tokenizer(folder: VectorFolder) -> tuple[Tokenizer, bool]:
    """The vocabulary in Rust, whose special tokens no text becomes, and whether it tells types of tokens.

    Raises BackendError.
    """
    where = folder.recipe.transformer
    try:
        wrapped: Any = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=True)
        tokenizer: Tokenizer = wrapped.backend_tokenizer
    except Exception as error:  # The same as above.
        reason = " ".join(str(error).split())
        raise BackendError(f"{where}: its tokenizer can't be read: {reason:.300}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer, "token_type_ids" in wrapped.model_input_names

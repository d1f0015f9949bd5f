"""GGUF files that embed and rank: their vectors are those of the same weights in transformers, in float64."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from test_cli import bundled_model
from vector_models import PIECES, TEXTS, bert, cosine, qwen3, states, tokenizer, write_gguf

from tightrope.backends.embedding.gguf import GGUFEmbedder
from tightrope.backends.embedding.protocol import Rows, TooLong
from tightrope.backends.errors import BackendError

CLOSE = 1 - 1e-3  # Cosine: llama.cpp attends in 16 bits, and its GELU is a table.


def vectors(embedder: GGUFEmbedder, *texts: str) -> Rows:
    return embedder.run([embedder.encode(text, None, "no") for text in texts], 1)


@pytest.mark.parametrize(
    ("pooling", "pooled"),
    [
        (gguf.PoolingType.MEAN, lambda hidden: hidden.mean(0)),
        (gguf.PoolingType.CLS, lambda hidden: hidden[0]),
        (gguf.PoolingType.LAST, lambda hidden: hidden[-1]),
    ],
)
@pytest.mark.parametrize("make", [bert, qwen3])
def test_vectors_are_pooled_as_the_file_says(make, pooling, pooled, tmp_path: Path):  # noqa: ANN001 - of two kinds
    model = make()
    embedder = GGUFEmbedder(write_gguf(tmp_path / "tiny.gguf", model, pooling), 2048, 1)

    rows = vectors(embedder, *TEXTS)

    for row, text in zip(rows, TEXTS, strict=True):
        assert cosine(row, pooled(states(model, text)).numpy()) > CLOSE
    assert np.array_equal(rows[2:3], vectors(embedder, TEXTS[2]))
    assert (embedder.card.kind, embedder.card.dimensions) == ("embedding", 32)
    assert embedder.card.is_nested == (make is qwen3)
    embedder.close()


def test_a_reranker_gives_the_logit_of_its_pair(tmp_path: Path):
    model = bert(num_labels=1, type_vocab_size=1)
    embedder = GGUFEmbedder(write_gguf(tmp_path / "rank.gguf", model, gguf.PoolingType.RANK), 2048, 1)

    rows = embedder.run([embedder.encode(text, "a red cat", "no") for text in TEXTS], 1)

    with torch.inference_mode():
        for row, text in zip(rows, TEXTS, strict=True):
            pair = tokenizer()("a red cat", text)["input_ids"]
            assert abs(row[0] - model.double()(torch.tensor([pair])).logits.item()) < 5e-3
    assert (embedder.card.kind, embedder.card.dimensions) == ("reranking", 1)
    embedder.close()


def test_a_reranker_that_needs_types_of_tokens_is_refused(tmp_path: Path):
    file = write_gguf(tmp_path / "rank.gguf", bert(num_labels=1), gguf.PoolingType.RANK)

    with pytest.raises(BackendError, match="by types of tokens, which llama"):
        GGUFEmbedder(file, 2048, 1)


def test_a_text_that_is_too_long_is_refused_or_loses_its_end_or_its_beginning(tmp_path: Path):
    embedder = GGUFEmbedder(write_gguf(tmp_path / "tiny.gguf", bert(), gguf.PoolingType.MEAN), 16, 1)
    ids = [PIECES.index(word) for word in ("[CLS]", *["the", "cat"] * 10, "[SEP]")]
    text = "the cat " * 10

    with pytest.raises(TooLong, match="has 22 tokens; the model takes at most 16"):
        embedder.encode(text, None, "no")
    assert embedder.encode(text, None, "end").ids == [*ids[:15], ids[-1]]
    assert embedder.encode(text, None, "start").ids == [ids[0], *ids[-15:]]
    with pytest.raises(TooLong):
        embedder.encode(text, text, "end")
    assert len(vectors(embedder, "the cat " * 7)) == 1
    embedder.close()


def test_what_looks_like_a_special_token_is_text(tmp_path: Path):
    embedder = GGUFEmbedder(write_gguf(tmp_path / "tiny.gguf", bert(), gguf.PoolingType.MEAN), 64, 1)

    assert list(embedder.encode("[SEP]", None, "no").ids).count(PIECES.index("[SEP]")) == 1
    embedder.close()


def test_a_chat_model_is_refused_with_one_line():
    with pytest.raises(BackendError, match=r"it makes no vectors of texts .*; name it with --model"):
        GGUFEmbedder(Path(bundled_model()), 2048, 1)


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path):
    model = bert(num_labels=1, type_vocab_size=1)
    file = write_gguf(tmp_path / "rank.gguf", model, gguf.PoolingType.RANK, **{"classifier.output_labels": ["a", "b"]})

    with pytest.raises(BackendError, match="tells 2 labels apart"):
        GGUFEmbedder(file, 2048, 1)

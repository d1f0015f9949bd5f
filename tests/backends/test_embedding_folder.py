"""Folders of sentence-transformers: their vectors are those of transformers in float64, pooled by the definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vector_models import MAX_TOKENS, PIECES, TEXTS, bert, cosine, qwen3, states, tokenizer, write_folder, write_json

from tightrope.backends.embedding.folder import FolderEmbedder
from tightrope.backends.embedding.protocol import Rows, TooLong
from tightrope.backends.errors import BackendError

CLOSE = 1 - 1e-5  # Cosine: ours is float32 throughout.


def opened(folder: Path, max_tokens: int = 2048) -> FolderEmbedder:
    return FolderEmbedder(folder, max_tokens, 1)


def vectors(embedder: FolderEmbedder, *texts: str) -> Rows:
    return embedder.run([embedder.encode(text, None, "no") for text in texts], 1)


POOLED = {
    "cls_token": lambda hidden: hidden[0],
    "mean_tokens": lambda hidden: hidden.mean(0),
    "max_tokens": lambda hidden: hidden.amax(0),
    "lasttoken": lambda hidden: hidden[-1],
    "mean_sqrt_len_tokens": lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
    "weightedmean_tokens": lambda hidden: (
        (hidden * torch.arange(1, len(hidden) + 1)[:, None]).sum(0) / torch.arange(1, len(hidden) + 1).sum()
    ),
}


@pytest.mark.parametrize("pooling", POOLED)
def test_each_pooling_gives_the_vectors_of_its_definition_in_any_company(pooling: str, tmp_path: Path):
    model = bert()
    embedder = opened(write_folder(tmp_path / "m", model, pooling=pooling))

    together, alone = vectors(embedder, *TEXTS), np.concatenate([vectors(embedder, text) for text in TEXTS])

    for row, lonely, text in zip(together, alone, TEXTS, strict=True):
        assert cosine(row, POOLED[pooling](states(model, text)).numpy()) > CLOSE
        assert np.allclose(row, lonely, atol=1e-4)
    assert cosine(together[0], together[1]) < 0.99  # Texts differ, so that the comparison means something.


def test_a_decoder_is_read_up_to_its_last_token(tmp_path: Path):
    model = qwen3()
    embedder = opened(write_folder(tmp_path / "m", model, pooling="lasttoken"))

    for row, text in zip(vectors(embedder, *TEXTS), TEXTS, strict=True):
        assert cosine(row, states(model, text)[-1].numpy()) > CLOSE
    assert embedder.card.is_nested


def test_layers_behind_the_pooling_are_computed_in_their_order(tmp_path: Path):
    model = bert()
    folder = write_folder(tmp_path / "m", model, dense=[(24, "Tanh"), (16, "Identity")])
    embedder = opened(folder)
    first, second = (load_file(folder / f"{number}_Dense/model.safetensors") for number in (2, 3))

    (row,) = vectors(embedder, TEXTS[0])

    pooled = states(model, TEXTS[0]).mean(0)
    hidden = torch.tanh(first["linear.weight"].double() @ pooled + first["linear.bias"])
    assert cosine(row, (second["linear.weight"].double() @ hidden + second["linear.bias"]).numpy()) > CLOSE
    assert embedder.card.dimensions == 16 == len(row)


def test_a_folder_without_modules_has_mean_vectors_and_says_so(tmp_path: Path):
    model = bert()
    embedder = opened(write_folder(tmp_path / "m", model, pooling=None))

    (row,) = vectors(embedder, TEXTS[1])

    assert cosine(row, states(model, TEXTS[1]).mean(0).numpy()) > CLOSE
    assert embedder.card.notes == (
        "pooling: the folder has no modules.json, so a vector is the mean of its tokens' states",
    )


def test_prompts_are_told_and_the_default_one_among_them(tmp_path: Path):
    prompts = {"query": "find: ", "document": ""}
    folder = write_folder(tmp_path / "m", bert(), prompts=prompts, default_prompt_name="query")

    assert opened(folder).card.prompts == prompts
    assert opened(folder).card.default_prompt == "query"


def test_a_reranker_gives_the_logit_of_transformers_for_a_pair(tmp_path: Path):
    model = bert(num_labels=1)
    embedder = opened(write_folder(tmp_path / "m", model, pooling=None))
    query = "a red cat"

    rows = embedder.run([embedder.encode(text, query, "no") for text in TEXTS], 1)

    with torch.inference_mode():
        for row, text in zip(rows, TEXTS, strict=True):
            wanted = model.double()(**tokenizer()(query, text, return_tensors="pt")).logits
            assert abs(row[0] - wanted.item()) < 1e-4
    assert embedder.card.kind == "reranking"
    assert len({round(float(row[0]), 3) for row in rows}) == len(TEXTS)


def test_a_text_that_is_too_long_is_refused_or_loses_its_end_or_its_beginning(tmp_path: Path):
    embedder = opened(write_folder(tmp_path / "m", bert()), max_tokens=6)
    ids = [PIECES.index(word) for word in ("[CLS]", "the", "cat", "sat", "on", "the", "mat", "[SEP]")]

    with pytest.raises(TooLong, match="has 8 tokens; the model takes at most 6"):
        embedder.encode(TEXTS[0], None, "no")
    assert embedder.encode(TEXTS[0], None, "end").ids == [*ids[:5], ids[-1]]
    assert embedder.encode(TEXTS[0], None, "start").ids == [ids[0], *ids[-5:]]
    assert opened(tmp_path / "m").card.max_tokens == MAX_TOKENS


def test_a_query_stays_whole_where_its_text_is_cut(tmp_path: Path):
    embedder = opened(write_folder(tmp_path / "m", bert(num_labels=1), pooling=None), max_tokens=8)
    ids = [PIECES.index(word) for word in ("[CLS]", "a", "red", "cat", "[SEP]", "the", "cat", "[SEP]")]

    assert embedder.encode(TEXTS[0], "a red cat", "end").ids == ids
    with pytest.raises(TooLong):
        embedder.encode(TEXTS[0], TEXTS[2], "end")


def test_what_looks_like_a_special_token_is_text(tmp_path: Path):
    embedder = opened(write_folder(tmp_path / "m", bert()))

    assert embedder.encode("[SEP]", None, "no").ids.count(PIECES.index("[SEP]")) == 1


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("modules.json", [{"type": "custom_st.Transformer", "path": ""}], "code of the model's own"),
        ("modules.json", [{"type": "sentence_transformers.models.CNN", "path": ""}], "module 0 is a CNN"),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": "../x"}], "leads out of"),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": "/etc"}], "leads out of"),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": ""}], "no Pooling"),
        ("modules.json", {}, "must be a list of 1 to 16 modules"),
        ("modules.json", [{}], "each module needs a type and a path"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": False}, "no pooling that is known"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "include_prompt": False}, "include_prompt"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length is 'long'"),
        ("config_sentence_transformers.json", {"prompts": [1]}, "prompts must be"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "default_prompt_name is 'q'"),
        ("config.json", {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 0}, "hidden_size is 0"),
        ("config.json", {"model_type": "bert"}, "architectures must name"),
        ("config.json", {"architectures": ["X"], "is_encoder_decoder": True}, "an encoder and a decoder"),
        ("config.json", {"architectures": ["X"], "quantization_config": {}}, "weights are quantized"),
        ("config.json", {"architectures": ["X"], "model_type": "nowhere"}, "transformers can't load it"),
    ],
)
def test_a_file_that_is_wrong_is_one_line_with_its_name(name: str, value: object, reason: str, tmp_path: Path):
    folder = write_folder(tmp_path / "m", bert())
    write_json(folder / name, value)

    with pytest.raises(BackendError) as caught:
        opened(folder)

    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_tensor_that_is_missing_is_named_instead_of_drawn_by_chance(tmp_path: Path):
    folder = write_folder(tmp_path / "m", bert())
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layer.1.attention" not in k}, folder / "model.safetensors")

    with pytest.raises(BackendError, match=r"tensor .*layer\.1\.attention.* is missing"):
        opened(folder)


def test_a_chat_model_and_a_classifier_of_two_labels_are_refused(tmp_path: Path):
    chats = write_folder(tmp_path / "chats", qwen3(), pooling=None)
    write_json(chats / "config.json", qwen3().config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})

    with pytest.raises(BackendError, match="it makes no vectors of texts: Qwen3ForCausalLM"):
        opened(chats)
    with pytest.raises(BackendError, match="tells 2 labels apart; a reranker has one"):
        opened(write_folder(tmp_path / "two", bert(num_labels=2), pooling=None))


def test_a_pickle_is_never_read(tmp_path: Path):
    folder = write_folder(tmp_path / "m", bert())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(BackendError):
        opened(folder)

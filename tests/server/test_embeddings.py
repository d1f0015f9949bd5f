"""Vectors and scores by each dialect's contract, from real models in a thread."""

import asyncio
import base64
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from fake_api import api, application
from vector_api import PROMPTS, embedding, http_of, in_a_thread, model, vector_api
from vector_models import MAX_TOKENS, PIECES, TEXTS, bert, cosine, states, tokenizer

from tightrope.backends.embedding.opening import open_embedders
from tightrope.backends.embedding.protocol import Embedder
from tightrope.backends.settings import ModelSettings
from tightrope.server.vectors.asking import MAX_TEXTS

LONG = "the cat " * MAX_TOKENS
MODELS = ["folder", "file.gguf"]


def reference(text: str) -> np.ndarray:
    """The text's vector by transformers in float64."""
    return states(bert(), text).mean(0).numpy()


def are_vectors(found: list[list[float]], texts: tuple[str, ...] = TEXTS) -> bool:
    return len(found) == len(texts) and all(
        cosine(np.array(row), reference(text)) > 1 - 1e-3 for row, text in zip(found, texts, strict=True)
    )


async def post(http: httpx.AsyncClient, path: str, **body: object) -> Any:  # noqa: ANN401 - JSON
    reply = await http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("name", MODELS)
async def test_openais_form_has_vectors_of_length_1_in_order_with_usage(name: str):
    async with vector_api(name) as http:
        found = await post(http, "/v1/embeddings", input=TEXTS, model="text-embedding-3-small", user="me")

        assert are_vectors([one["embedding"] for one in found["data"]])
        assert [one["index"] for one in found["data"]] == [0, 1, 2, 3]
        assert {one["object"] for one in found["data"]} == {"embedding"}
        assert np.allclose([np.linalg.norm(one["embedding"]) for one in found["data"]], 1, atol=1e-5)
        count = sum(len(tokenizer()(text)["input_ids"]) for text in TEXTS)
        assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
        assert (found["object"], found["model"]) == ("list", name.removesuffix(".gguf"))


async def test_openais_form_takes_one_text_token_ids_and_lists_of_them():
    ids = tokenizer()(TEXTS[0])["input_ids"]
    async with vector_api("folder") as http:
        for inputs in (TEXTS[0], ids, [ids], [float(i) for i in ids]):
            found = await post(http, "/embeddings", input=inputs)
            assert are_vectors([one["embedding"] for one in found["data"]], TEXTS[:1])


async def test_base64_is_the_same_numbers():
    async with vector_api("folder") as http:
        plain, packed = [
            (await post(http, "/v1/embeddings", input=TEXTS, encoding_format=form))["data"]
            for form in ("float", "base64")
        ]

    for one, other in zip(plain, packed, strict=True):
        raw = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        assert np.array_equal(raw, np.array(one["embedding"], np.float32))


async def test_a_hundred_texts_are_their_own_vectors_each():
    texts = tuple(f"{first} {second}" for first in PIECES[5:15] for second in PIECES[5:15])
    async with vector_api("file.gguf") as http:
        found = await post(http, "/v1/embeddings", input=texts)

        assert are_vectors([one["embedding"] for one in found["data"]], texts)


async def test_a_text_that_is_too_long_is_refused_or_cut_as_the_dialect_says():
    whole = tokenizer()(LONG, truncation=True, max_length=16)["input_ids"]
    async with vector_api("folder", max_tokens=16) as http:
        refused = await http.post("/v1/embeddings", json={"input": ["fish", LONG]})
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert refused.json()["error"]["param"] == "input[1]"
        assert "maximum context length is 16 tokens" in refused.json()["error"]["message"]
        found = await post(http, "/v1/embeddings", input=LONG, truncate_prompt_tokens=-1)
        assert found["usage"]["prompt_tokens"] == 16

        refused = await http.post("/embed", json={"inputs": LONG})
        assert (refused.status_code, refused.json()["error_type"]) == (413, "Validation")
        assert refused.json()["error"] == "`inputs` must have less than 16 tokens. Given: 130"
        (right,) = await post(http, "/embed", inputs=LONG, truncate=True)
        (same,) = await post(http, "/embed", inputs=whole)
        assert cosine(np.array(right), np.array(same)) > 1 - 1e-5
        (left,) = await post(http, "/embed", inputs="fish " + LONG, truncate=True, truncation_direction="Left")
        assert cosine(np.array(right), np.array(left)) > 1 - 1e-5  # The fish is cut off.

        refused = await http.post("/api/embed", json={"input": LONG, "truncate": False})
        assert (refused.status_code, "16 tokens" in refused.json()["error"]) == (400, True)
        assert (await post(http, "/api/embed", input=LONG))["prompt_eval_count"] == 16
        assert (await http.post("/embedding", json={"content": LONG})).status_code == 400
        assert (await post(http, "/api/extra/embeddings", input=LONG))["usage"]["prompt_tokens"] == 16


async def test_vectors_are_cut_only_where_the_model_was_trained_for_it():
    async with vector_api("folder") as http:
        refused = await http.post("/v1/embeddings", json={"input": "fish", "dimensions": 8})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")
        assert "not trained for shorter vectors; they have 32 numbers" in refused.json()["error"]["message"]
        assert len((await post(http, "/v1/embeddings", input="fish", dimensions=32))["data"][0]["embedding"]) == 32


async def test_prompts_of_the_models_own_stand_in_front_by_their_names():
    async with vector_api("folder") as http:
        (named,) = await post(http, "/embed", inputs="fish", prompt_name="query")
        assert are_vectors([named], (PROMPTS["query"] + "fish",))
        refused = await http.post("/v1/embeddings", json={"input": "fish", "prompt_name": "passage"})
        assert "it has query, document" in refused.json()["error"]["message"]


async def test_embed_of_text_embeddings_inference_scales_unless_told_not_to():
    async with vector_api("file.gguf") as http:
        assert are_vectors(await post(http, "/embed", inputs=TEXTS))
        (raw,) = await post(http, "/embed", inputs=TEXTS[0], normalize=False)
        assert abs(np.linalg.norm(raw) - np.linalg.norm(reference(TEXTS[0]))) < 0.05
        assert (await http.post("/embed", json={"inputs": 3})).status_code == 422
        empty = await http.post("/embed", json={"inputs": []})
        assert (empty.status_code, empty.json()["error_type"]) == (413, "Validation")


async def test_ollamas_two_routes():
    async with vector_api("folder") as http:
        found = await post(http, "/api/embed", input=TEXTS, model="folder:latest", keep_alive="5m", options={})
        assert are_vectors(found["embeddings"])
        assert (found["model"], found["load_duration"], found["total_duration"] > 0) == ("folder:latest", 0, True)
        older = await http.post("/api/embeddings", content=b'{"model": "x", "prompt": "fish!"}')  # No Content-Type.
        assert are_vectors([older.json()["embedding"]], ("fish!",))
        assert abs(np.linalg.norm(older.json()["embedding"]) - np.linalg.norm(reference("fish!"))) < 1e-3
        assert await post(http, "/api/embeddings", model="x", prompt="") == {"embedding": []}
        assert (await post(http, "/api/embed", model="x"))["embeddings"] == []


async def test_llama_cpps_own_form_scales_by_the_norm_that_is_named():
    async with vector_api("folder") as http:
        for path in ("/embedding", "/embeddings"):
            found = await post(http, path, content=TEXTS)
            assert are_vectors([row for one in found for row in one["embedding"]])
            assert [one["index"] for one in found] == [0, 1, 2, 3]
        sizes = {}
        for norm in (-1, 0, 1, 2, 6):
            ((one,),) = [r["embedding"] for r in await post(http, "/embedding", content="fish", embd_normalize=norm)]
            sizes[norm] = np.array(one)
        assert abs(np.linalg.norm(sizes[-1]) - np.linalg.norm(reference("fish"))) < 1e-3
        assert abs(np.abs(sizes[0]).max() - 32760) < 0.1
        assert abs(np.abs(sizes[1]).sum() - 1) < 1e-5
        assert abs(np.linalg.norm(sizes[2]) - 1) < 1e-5
        assert abs((np.abs(sizes[6]) ** 6).sum() - 1) < 1e-5


async def test_koboldcpps_form():
    async with vector_api("folder") as http:
        found = await post(http, "/api/extra/embeddings", input=list(TEXTS), model="x")
        assert are_vectors([one["embedding"] for one in found["data"]])


async def test_reranking_by_jinas_and_coheres_form_has_the_best_first():
    async with vector_api("folder", "ranker") as http:
        reply = await post(http, "/v1/rerank", query="a red cat", documents=TEXTS, model="ranker", top_n=3)

        scores = [one["relevance_score"] for one in reply["results"]]
        assert scores == sorted(scores, reverse=True)
        assert all(0 <= score <= 1 for score in scores)
        assert len({one["index"] for one in reply["results"]}) == 3
        assert (reply["model"], reply["object"]) == ("ranker", "list")
        assert reply["usage"]["total_tokens"] == sum(len(tokenizer()("a red cat", t)["input_ids"]) for t in TEXTS)
        shown = await post(http, "/rerank", query="q", documents=[{"text": TEXTS[0]}, TEXTS[1]], return_documents=True)
        assert {one["document"]["text"] for one in shown["results"]} == set(TEXTS[:2])
        assert "document" not in reply["results"][0]


async def test_reranking_by_text_embeddings_inferences_form():
    async with vector_api("ranker") as http:
        scored = await post(http, "/rerank", query="a red cat", texts=TEXTS)
        raw = await post(http, "/rerank", query="a red cat", texts=TEXTS, raw_scores=True, return_text=True)

        assert [one["index"] for one in scored] == [one["index"] for one in raw]
        assert [one["text"] for one in raw] == [TEXTS[one["index"]] for one in raw]
        for one, other in zip(scored, raw, strict=True):
            assert abs(one["score"] - 1 / (1 + np.exp(-other["score"]))) < 1e-6
        refused = await http.post("/rerank", json={"query": "q", "texts": [LONG]})
        assert (refused.status_code, refused.json()["error_type"]) == (413, "Validation")
        assert len(await post(http, "/rerank", query="q", texts=[LONG], truncate=True)) == 1
        assert "texts" in (await http.post("/rerank", json={"query": "q"})).json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/embeddings", {"input": "fish"}, ["error", "message"]),
        ("/embeddings", {"content": "fish"}, ["error", "message"]),
        ("/embedding", {"content": "fish"}, ["error", "message"]),
        ("/v1/rerank", {"query": "q", "documents": ["fish"]}, ["error", "message"]),
        ("/rerank", {"query": "q", "texts": ["fish"]}, ["error"]),
        ("/embed", {"inputs": "fish"}, ["error"]),
        ("/api/embed", {"input": "fish"}, ["error"]),
        ("/api/embeddings", {"prompt": "fish"}, ["error"]),
        ("/api/extra/embeddings", {"input": "fish"}, ["error", "message"]),
    ],
)
async def test_without_the_flag_each_dialects_error_names_it(path: str, body: dict[str, object], words: list[str]):
    async with api() as http:
        reply = await http.post(path, json=body)

        told = reply.json()
        for word in words:
            told = told[word]
        assert reply.status_code == 501
        assert "start it with --embedding-model" in told


async def test_a_model_of_the_other_kind_alone_is_told():
    async with vector_api("ranker") as http:
        assert "name an embedding model with it" in (await http.post("/embed", json={"inputs": "a"})).json()["error"]


async def test_names_that_fit_nothing_are_taken_unless_the_settings_say_no():
    async with vector_api("folder", any_model_name=False) as http:
        assert (await http.post("/v1/embeddings", json={"input": "fish", "model": "x"})).status_code == 404
        await post(http, "/v1/embeddings", input="fish", model="folder")


async def test_inputs_have_bounds():
    async with vector_api("folder") as http:
        for inputs, word in (
            ([], "must not be empty"),
            (["a"] * (MAX_TEXTS + 1), f"it may have {MAX_TEXTS}"),
            ([10**6], "token ids from 1000000"),
            ([[-1]], "token ids from -1"),
            ([[]], "has no tokens"),
            ([["a"]], "input"),
            ({"a": 1}, "input"),
            ([1, "a"], "input"),
        ):
            reply = await http.post("/v1/embeddings", json={"input": inputs})
            assert reply.status_code == 400
            assert word in reply.json()["error"]["message"]
        assert (await post(http, "/v1/embeddings", input=""))["usage"]["prompt_tokens"] == 2


async def test_a_field_that_would_change_the_vectors_and_is_not_read_is_refused():
    async with vector_api("folder") as http:
        reply = await http.post("/v1/embeddings", json={"input": "fish", "instructions": "find"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "instructions")


async def test_the_lists_of_models_have_those_beside_and_chats_refuse_them():
    async with vector_api("folder", "ranker") as http:
        listed = [one["id"] for one in (await http.get("/v1/models")).json()["data"]]
        assert listed[1:] == ["folder", "ranker"]
        assert (await http.get("/v1/models/folder")).json()["max_model_len"] == MAX_TOKENS
        assert [one["name"] for one in (await http.get("/api/tags")).json()["models"]] == listed
        shown = await post(http, "/api/show", model="folder:latest")
        assert shown["capabilities"] == ["embedding"]
        assert shown["model_info"]["BertModel.embedding_length"] == 32
        assert (await post(http, "/api/show", model="ranker"))["capabilities"] == ["reranking"]
        assert (await http.get("/api/extra/version")).json()["embeddings"] is True
        for path, body in (
            ("/v1/completions", {"prompt": "what?"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "what?"}]}),
            ("/api/generate", {"prompt": "what?"}),
        ):
            reply = await http.post(path, json=body | {"model": "folder"})
            assert reply.status_code == 400
            assert "folder writes no text: it makes vectors of texts, on /v1/embeddings" in reply.text


async def test_a_chat_goes_on_beside():
    async with vector_api("folder") as http:
        found = await post(http, "/v1/completions", prompt="what?", max_tokens=4)
        assert found["choices"][0]["text"] == "fine"
        assert model("folder")


async def test_the_server_is_not_ready_before_its_embedding_models_are():
    """The chat model's memory is planned for with these in place."""
    goes_on = threading.Event()

    def late(settings: ModelSettings) -> list[Embedder]:
        assert goes_on.wait(60)
        return open_embedders(settings)

    loading = {"embedding": embedding("folder"), "launch_embedder": in_a_thread(late)}
    async with application(is_awaited=False, **loading) as app, http_of(app) as http:
        assert (await http.get("/health")).status_code == 503
        for path, body in (("/v1/completions", {"prompt": "a?"}), ("/v1/embeddings", {"input": "a"})):
            for stream in (False, True):
                reply = await http.post(path, json=body | ({"stream": True} if stream else {}))
                assert reply.status_code == 503, path
                assert "still loading" in reply.json()["error"]["message"]
        goes_on.set()
        async with asyncio.timeout(240):
            while (await http.get("/health")).status_code != 200:
                await asyncio.sleep(0)  # Without a socket nothing here waits.
        await post(http, "/v1/embeddings", input="a")


async def test_metrics_tell_of_the_texts_where_there_is_such_a_model():
    async with vector_api("file.gguf") as http:
        await post(http, "/v1/embeddings", input=TEXTS)
        await post(http, "/v1/embeddings", input=TEXTS[0])
        told = dict(line.rsplit(" ", 1) for line in (await http.get("/metrics")).text.splitlines() if line[0] != "#")
    names = ("ready", "waiting", "requests_total", "texts_total", "restarts_total")
    assert [float(told[f"tightrope_embedding_{name}"]) for name in names] == [1, 0, 2, len(TEXTS) + 1, 0]
    count = sum(len(tokenizer()(text)["input_ids"]) for text in (*TEXTS, TEXTS[0]))
    assert float(told["tightrope_embedding_tokens_total"]) == count
    async with api() as http:
        assert "tightrope_embedding" not in (await http.get("/metrics")).text

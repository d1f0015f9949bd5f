"""Vectors by three packages, each in its own way: OpenAI's in base64 and in numbers, Ollama's twice, the hub's."""

import json
import os
import sys
from importlib.metadata import version

import ollama
import openai
from huggingface_hub import InferenceClient

TEXTS = ["The cat sits outside", "A man is playing guitar", "The new movie is awesome"]
URL = os.environ["URL"]


def tell(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")


tell(versions=[version(name) for name in ("openai", "ollama", "huggingface_hub")])
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
packed = client.embeddings.create(model="text-embedding-3-small", input=TEXTS)  # The package asks for base64 by itself.
tell(openai=[one.embedding for one in packed.data], usage=packed.usage.total_tokens)
plain = client.embeddings.create(model="text-embedding-3-small", input=TEXTS, encoding_format="float")
tell(plain=[one.embedding for one in plain.data])
tell(ollama=ollama.Client(host=URL).embed(model="any", input=TEXTS).embeddings)
tell(older=[ollama.Client(host=URL).embeddings(model="any", prompt=text).embedding for text in TEXTS])
hub = InferenceClient(model=f"{URL}/embed")
tell(hub=[hub.feature_extraction(text, normalize=True).tolist() for text in TEXTS])

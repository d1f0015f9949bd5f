"""Answers batches of prompts with transformers' plain `generate`, and says when each token came.

GET /health answers once the model is loaded. POST / with {"prompts": [...], "max_tokens": n} answers
{"prompt_tokens": [...], "arrivals_s": [...]}: seconds from the request to each of the n tokens, which all prompts of a
batch get at the same time. Greedy, to the last token asked for; prompts are padded on the left.
"""

import argparse
import json
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


class Clock:
    """A stopping criterion that stops nothing: `generate` asks it after each token, and it notes the time."""

    def __init__(self) -> None:
        self.began_s = time.perf_counter()
        self.arrivals_s: list[float] = []

    def __call__(self, token_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """token_ids [B, n] so far; returns [B] bool, all False."""
        self.arrivals_s.append(time.perf_counter() - self.began_s)
        return torch.zeros(len(token_ids), dtype=torch.bool)


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_tokens: int
) -> dict[str, list[float]]:
    """Generate `max_tokens` tokens for all prompts at once; returns what the module's first lines say."""
    clock = Clock()
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    generate: Any = model.generate  # Any: its decorators lose its signature
    generate(
        **batch,
        max_new_tokens=max_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[clock],
    )
    return {"prompt_tokens": batch["attention_mask"].sum(-1).tolist(), "arrivals_s": clock.arrivals_s}


def load(folder: str, dtype: str, attention: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder; dtype is float32 or bfloat16, attention one of transformers' implementations."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    return model.eval(), tokenizer


def serve(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, port: int) -> HTTPServer:
    """A server on 127.0.0.1 that runs one batch at a time."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._reply(answer(model, tokenizer, body["prompts"], body["max_tokens"]))

        def _reply(self, content: dict[str, list[float]]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, format: str, *args: object) -> None:
            """A line for each request is of no use here."""

    return HTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--attention", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    serve(*load(options.model, options.dtype, options.attention), options.port).serve_forever()


if __name__ == "__main__":
    main()

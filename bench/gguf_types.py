"""What each GGUF type costs in exactness, in our own engine and in llama.cpp: python -m bench.gguf_types [--tokens N]

Three models for each type. Two llamas of random weights, whose rows K- and IQ-types can hold, are compared with float64
products of the numbers that their blocks stand for: a small one with rows of 512 and 1,536, and a layer of Mistral-7B's
shape, under a table in F16. SmolLM2, whose rows of 576 have whole blocks of 32, predicts English text. ggml's own
quantizers write all files; both engines keep keys and values in 16 bits. What the results have of others stays.
"""

import argparse
import ctypes
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from llama_cpp import llama_cpp
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from bench import report
from bench.english import NAME, english_text
from bench.large_gguf import MISTRAL_7B, Sizes, copy_keys
from tightrope.backends.detect import open_backend
from tightrope.backends.files.gguf.tensor_types import TENSOR_TYPES
from tightrope.backends.locate import bundled_model
from tightrope.backends.protocol import Backend, Chunk
from tightrope.backends.quant.gguf import BLOCK_TYPES
from tightrope.backends.settings import CacheSettings, GgufEngine, ModelSettings
from tightrope.engine.perplexity import cut_windows, measure
from tightrope.kernels import dispatch

KINDS = (*BLOCK_TYPES, "F16", "BF16", "F32")
ENGINES: tuple[GgufEngine, ...] = ("own", "llama.cpp")
SMALL, LARGE = Sizes(512, 1536, 8, 4, layers=4), replace(MISTRAL_7B, layers=1)
MOST_RELATIVE, MOST_WORSE = 1e-3, 1e-3  # Of logits to float64's, by length; of perplexity to llama.cpp's.
PROMPT, CONTEXT = 128, 512
TABLE = "token_embd.weight"
Array = NDArray[np.float32]


def quantizer() -> Callable[[str, Array], tuple[NDArray[np.uint8], GGMLQuantizationType]]:
    """ggml's own, of matrices [N, K] to the bytes of a type [N, bytes of a row]."""
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_row_size.restype = ctypes.c_size_t

    def quantize(kind: str, values: Array) -> tuple[NDArray[np.uint8], GGMLQuantizationType]:
        code, (rows, width) = GGMLQuantizationType[kind], values.shape
        values = np.ascontiguousarray(values)
        size = library.ggml_row_size(ctypes.c_int(code), ctypes.c_int64(width))
        out = np.empty((rows, size), np.uint8)
        places = ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(out.ctypes.data)
        library.ggml_quantize_chunk(
            ctypes.c_int(code), *places, ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(width), None
        )
        return out, code

    return quantize


def write(
    path: Path, kind: str, tensors: dict[str, Array], keys: Callable[[GGUFWriter], None], table: str | None = None
) -> dict[str, Array]:
    """A llama of these tensors, its matrices in one type, or its table in another; returns what the file stands for."""
    quantize, writer = quantizer(), GGUFWriter(path, "llama")
    keys(writer)
    meant: dict[str, Array] = {}
    for name, values in tensors.items():
        if values.ndim == 1:
            meant[name] = values
            writer.add_tensor(name, values)
            continue
        own = table if table is not None and name == TABLE else kind
        encoded, code = (values.view(np.uint8), GGMLQuantizationType.F32) if own == "F32" else quantize(own, values)
        meant[name] = values if own == "F32" else dequantize(encoded, code)
        writer.add_tensor(name, encoded, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def smollm2() -> dict[str, Array]:
    """All tensors of the bundled file as the numbers that they stand for."""
    reader = GGUFReader(bundled_model())
    return {t.name: np.array(dequantize(t.data, t.tensor_type), np.float32) for t in reader.tensors}


def random_llama(sizes: Sizes, vocab_size: int) -> dict[str, Array]:
    """Random weights by the names of the file, of a size that keeps that of hidden states; heads are tied."""
    random = np.random.default_rng(11)
    norms = [f"blk.{layer}.{norm}" for layer in range(sizes.layers) for norm in ("attn_norm", "ffn_norm")]
    tensors = {
        f"{name}.weight": 1 + 0.2 * random.standard_normal(sizes.hidden).astype(np.float32)
        for name in (*norms, "output_norm")
    }
    tensors[TABLE] = random.standard_normal((vocab_size, sizes.hidden), np.float32) * sizes.hidden**-0.5
    for layer in range(sizes.layers):
        for name, shape in sizes.matrices.items():
            tensors[f"blk.{layer}.{name}.weight"] = random.standard_normal(shape, np.float32) * shape[1] ** -0.5
    return tensors


def random_keys(sizes: Sizes, writer: GGUFWriter) -> None:
    copy_keys(writer, only="tokenizer.")
    writer.add_block_count(sizes.layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.inner)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_rope_dimension_count(sizes.hidden // sizes.heads)
    writer.add_layer_norm_rms_eps(1e-5)


def exact_logits(sizes: Sizes, meant: dict[str, Array], token_ids: list[int]) -> Tensor:
    """[T, V] float64 of transformers' class with the numbers that a file of a random llama stands for."""
    config = LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.inner, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, rms_norm_eps=1e-5,
        vocab_size=len(meant[TABLE]), max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    )  # fmt: skip
    with no_init_weights():
        model = LlamaForCausalLM(config).double().eval()
    model.tie_weights()  # Without initial weights the class leaves its head alone.
    heads = {"attn_q": sizes.heads, "attn_k": sizes.kv_heads}
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    parameters = dict(model.named_parameters())
    for name, values in meant.items():
        part = name.split(".")[-2]
        whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}.get(part)
        module = whole or f"model.layers.{name.split('.')[1]}.{parts[part]}"
        weight = torch.from_numpy(values).double()
        if part in heads:  # Files of llamas have the rows of a head in pairs.
            weight = weight.view(heads[part], -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        parameters.pop(f"{module}.weight").data.copy_(weight)
    assert not parameters, "all weights are the file's"
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def opened(path: Path, engine: GgufEngine, threads: int) -> Backend:
    """llama.cpp as it is, without our attention in its steps."""
    settings = ModelSettings(
        model=str(path), gguf_engine=engine, device="cpu", threads=threads, max_model_len=CONTEXT, max_num_seqs=1,
        cache=CacheSettings(tokens=CONTEXT, dtype="f16"),
    )  # fmt: skip
    with patch.object(dispatch, "cell_attention", return_value=None) if engine == "llama.cpp" else nullcontext():
        return open_backend(settings, lambda share: None)


def run(backend: Backend, token_ids: list[int]) -> Tensor:
    """[T, V] float64, read in steps of what the backend takes at most."""
    backend.kv.open(0, token_ids, "")
    parts = []
    for start in range(0, len(token_ids), backend.capabilities.max_step_tokens):
        some = token_ids[start : start + backend.capabilities.max_step_tokens]
        assert backend.kv.reserve(0, start + len(some))
        parts.append(backend.forward([Chunk(0, some, start, "all")]).double())
        backend.kv.commit(0, start, some)
    return torch.cat(parts)


def of_random(sizes: Sizes, kind: str, tensors: dict[str, Array], folder: Path, threads: int) -> dict[str, Any]:
    """By engine, relative error of logits to float64's, and the mean divergence of the next token in nats."""
    path = folder / "random.gguf"
    meant = write(path, kind, tensors, partial(random_keys, sizes), None if sizes is SMALL else "F16")
    token_ids = [(i * i // 7 + 31 * i) % 40_000 + 100 for i in range(PROMPT)]
    exact = exact_logits(sizes, meant, token_ids)
    base = exact.log_softmax(-1)
    found: dict[str, Any] = {}
    for engine in ENGINES:
        with closing(opened(path, engine, threads)) as backend:
            logits = run(backend, token_ids)
        divergence = (base.exp() * (base - logits.log_softmax(-1))).sum(-1).mean()
        found[engine] = {
            "relative_error": float(f"{(logits - exact).norm() / exact.norm():.2e}"),
            "mean_kl": float(f"{divergence:.2e}"),
        }
    return found


def of_smollm2(kind: str, tensors: dict[str, Array], folder: Path, tokens: int, threads: int) -> dict[str, Any]:
    """By engine, perplexity of English; and how much worse ours is."""
    path = folder / "smollm2.gguf"
    write(path, kind, tensors, copy_keys)
    found: dict[str, Any] = {}
    for engine in ENGINES:
        with closing(opened(path, engine, threads)) as backend:
            ids = backend.tokenizer.encode(english_text(), parse_special=False, is_start=True)
            score = measure(backend, cut_windows(ids, CONTEXT, None, tokens), lambda n: None)
            found[engine] = round(score.perplexity, 4)
    return {**found, "tokens": score.num_tokens, "worse": round(found["own"] / found["llama.cpp"] - 1, 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--tokens", type=int, default=4096, help="of English, that SmolLM2 predicts; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    whole = smollm2()
    small, large = (random_llama(sizes, len(whole[TABLE])) for sizes in (SMALL, LARGE))
    rows: dict[str, dict[str, Any]] = {row["type"]: row for row in report.known("gguf_types").get("rows", [])}
    for kind in options.kind:
        row: dict[str, Any] = rows.setdefault(kind, {"type": kind})
        with TemporaryDirectory() as folder:
            row["small"] = of_random(SMALL, kind, small, Path(folder), options.threads)
            row["7b"] = of_random(LARGE, kind, large, Path(folder), options.threads)
            row["is_exact"] = max(row[name]["own"]["relative_error"] for name in ("small", "7b")) <= MOST_RELATIVE
            if options.tokens and (kind not in BLOCK_TYPES or TENSOR_TYPES[GGMLQuantizationType[kind]].values == 32):
                row["smollm2"] = of_smollm2(kind, whole, Path(folder), options.tokens, options.threads)
                row["is_no_worse"] = row["smollm2"]["worse"] <= MOST_WORSE
        print(row, flush=True)
        ordered = [rows[kind] for kind in KINDS if kind in rows]
        report.write("gguf_types", {"text": NAME, "rows": ordered})


if __name__ == "__main__":
    main()

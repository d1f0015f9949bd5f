"""What the layout of the cache costs in quality: divergence and perplexity against an f16 cache, side by side.

    python -m bench.kv_quality SMOLLM2_FOLDER GEMMA3_FOLDER [--tokens 6144]

Each model, a folder in bf16, predicts the same English text in windows, with an f16 cache and, in lockstep on the same
weights, with 8-bit and 4-bit keys and values in three layouts: keys before rotation divided by a factor for each
channel (what is served), before rotation without it, and after rotation (llama.cpp's). All have one scale for 32 values
of a token. The last is computed by rotating, rounding to codes, and rotating back what is then kept in 16 bits, whose
own rounding is a tenth of that of 8 bits or less. Memory per token is counted in the allocated tensors.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

from bench import report
from bench.english import NAME, english_text
from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.run.variants import CacheVariant
from tightrope.backends.hf.runner import ModelRunner
from tightrope.backends.protocol import Chunk
from tightrope.backends.settings import CacheSettings, ModelSettings
from tightrope.engine.perplexity import Score, compare, cut_windows, window_bos
from tightrope.kernels import dispatch, reference
from tightrope.kernels.forms.layout import CacheDtype, LayerCache, RopeTable

KINDS: tuple[CacheDtype, ...] = ("q8", "q4")
FACTOR, PLAIN, AFTER = "before rotation, channel factor", "before rotation", "after rotation"
MOST_KL, MOST_CHANGE, MOST_RATIO = 0.0004, 0.001, 0.6  # nats of q8; of its perplexity; of the KL after rotation


class AfterRotation(CacheVariant):
    """A variant with an f16 cache into which keys and values go through the layout after rotation."""

    def __init__(self, base: HFBackend, dtype: CacheDtype) -> None:
        variants = base.variants()
        super().__init__(base, variants.runner(["f16"] * variants.num_layers), base.inputs)
        self._dtype = dtype

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """See Backend."""
        inputs, runner = self.inputs(chunks), self.runner
        assert isinstance(runner, ModelRunner), "one rank has all of the model"
        step, tables = inputs.layout.to(runner.model.device), runner.tables(inputs)
        back = {name: _reversed(table) for name, table in tables.items()}
        rope_of = {id(c): layer.rope for c, layer in zip(runner.caches, runner.model.layers, strict=True)}
        store = dispatch.store_kv

        def store_rounded(cache: LayerCache, keys: Tensor, values: Tensor, slots: Tensor) -> None:
            rope = rope_of[id(cache)]
            assert rope is not None, "this layer's keys come rotated"
            turned = reference.rotate(keys.float(), step, tables[rope])
            keys = reference.rotate(self._rounded(turned), step, back[rope])
            store(cache, keys, self._rounded(values.float()), slots)

        with (
            patch.object(dispatch, "store_kv", store_rounded),
            patch.object(dispatch, "decoder_layers", lambda *inputs: None),  # it would store by itself
        ):
            return super().forward(chunks)

    def _rounded(self, x: Tensor) -> Tensor:
        return reference.dequantize(*reference.quantize(x, self._dtype), self._dtype, x.shape[-1])


def _reversed(table: RopeTable) -> RopeTable:
    """The table that turns the other way."""
    assert bool((table.query_scale == 1).all()), "a scaling with an attention factor"
    sign = torch.tensor([1.0, -1.0], device=table.pages.device).unsqueeze(-1)  # of cosine and sine
    return replace(table, pages=table.pages * sign, places=table.places * sign)


def measure_model(folder: Path, text: str, context: int, tokens: int) -> dict[str, Any]:
    """The numbers of one model. Any: ready for JSON."""
    settings = ModelSettings(max_model_len=context, max_num_seqs=1, cache=CacheSettings(tokens=context, dtype="f16"))
    with closing(HFBackend(folder, settings, lambda share: None)) as base:
        lanes = _lanes(base)
        token_ids = base.tokenizer.encode(text, parse_special=False, is_start=True)
        windows = cut_windows(token_ids, context, window_bos(base.tokenizer), tokens)
        total = len(windows) * (context - 1) * (1 + len(lanes))
        with tqdm(total=total, desc=folder.name, unit="tok", disable=None) as bar:
            first, *scores = compare(base, list(lanes.values()), windows, lambda n: bar.update(n) and None)
        rows = [_row(kind, layout, score, first) for (kind, layout), score in zip(lanes, scores, strict=True)]
        return {
            "model": folder.name,
            "context": context,
            "tokens": first.num_tokens,
            "f16_perplexity": round(first.perplexity, 5),
            "rows": rows,
            "bytes_per_token": _memory(base, lanes),
            "verdicts": judge(rows),
        }


def _lanes(base: HFBackend) -> dict[tuple[CacheDtype, str], CacheVariant]:
    variants = base.variants()
    lanes: dict[tuple[CacheDtype, str], CacheVariant] = {}
    for kind in KINDS:
        dtypes = [kind] * variants.num_layers
        lanes[kind, FACTOR] = variants.variant(dtypes)
        lanes[kind, PLAIN] = variants.variant(dtypes, has_factors=False)
        lanes[kind, AFTER] = AfterRotation(base, kind)
    return lanes


def _row(kind: str, layout: str, score: Score, base: Score) -> dict[str, object]:
    return {
        "cache": kind,
        "keys": layout,
        "mean_kl": float(f"{score.mean_divergence:.6g}"),
        "perplexity": round(score.perplexity, 5),
        "perplexity_change": float(f"{score.perplexity / base.perplexity - 1:.4g}"),
    }


def _memory(base: HFBackend, lanes: dict[tuple[CacheDtype, str], CacheVariant]) -> dict[str, dict[str, float]]:
    """Planned and allocated bytes of one token's keys and values in all layers."""
    served: dict[str, HFBackend | CacheVariant] = {"f16": base, **{kind: lanes[kind, FACTOR] for kind in KINDS}}
    return {
        kind: {"planned": backend.card.cache_token_bytes, "allocated": allocated_bytes(backend.runner.caches)}
        for kind, backend in served.items()
    }


def allocated_bytes(caches: Sequence[LayerCache]) -> float:
    """Bytes of codes and scales, for each token that there is room for."""
    tensors = [t for c in caches for t in (c.key_codes, c.key_scales, c.value_codes, c.value_scales)]
    return sum(tensor.nbytes / (tensor.shape[0] * tensor.shape[2]) for tensor in tensors)  # [P, Hkv, PAGE, ...]


def judge(rows: Sequence[dict[str, object]]) -> dict[str, dict[str, object]]:
    """What the served layout must reach, beside what it does."""
    found = {(str(row["cache"]), str(row["keys"])): row for row in rows}

    def value(kind: str, layout: str, name: str) -> float:
        return float(str(found[kind, layout][name]))

    measured = {
        "mean KL of q8": (value("q8", FACTOR, "mean_kl"), MOST_KL),
        "change of perplexity by q8": (abs(value("q8", FACTOR, "perplexity_change")), MOST_CHANGE),
        **{
            f"mean KL of {kind} over that after rotation": (
                value(kind, FACTOR, "mean_kl") / value(kind, AFTER, "mean_kl"),
                MOST_RATIO,
            )
            for kind in KINDS
        },
    }
    return {
        name: {"value": float(f"{value:.4g}"), "at_most": most, "met": value <= most}
        for name, (value, most) in measured.items()
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """All models side by side, in GitHub's markdown. Any: read back from JSON."""
    lines = [
        "| model | cache | bytes/token | keys | mean KL (nats) | perplexity | change |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for model in found:
        held = {kind: f"{sizes['allocated']:.0f}" for kind, sizes in model["bytes_per_token"].items()}
        lines.append(f"| {model['model']} | f16 | {held['f16']} | | | {model['f16_perplexity']:.4f} | |")
        for row in model["rows"]:
            numbers = f"{row['mean_kl']:.6f} | {row['perplexity']:.4f} | {row['perplexity_change']:+.3%}"
            lines.append(f"| | {row['cache']} | {held[row['cache']]} | {row['keys']} | {numbers} |")
    return "\n".join(lines)


def _known(context: int, tokens: int) -> list[dict[str, Any]]:
    results = report.known("kv_quality")
    same = (results.get("context"), results.get("max_tokens")) == (context, tokens)
    return list(results["models"]) if same else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a model in safetensors")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=6144, help="most tokens, but one window")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results have")
    args = parser.parse_args(arguments)
    text = english_text()
    known = [] if args.fresh else _known(args.context, args.tokens)
    found = {str(model["model"]): model for model in known}
    for folder in args.folders:
        if folder.name not in found:
            found[folder.name] = measure_model(folder, text, args.context, args.tokens)
            results = {"text": NAME, "context": args.context, "max_tokens": args.tokens, "models": list(found.values())}
            report.write("kv_quality", results)
    print(table(list(found.values())))
    for name, model in found.items():
        for what, verdict in model["verdicts"].items():
            print(
                f"{name}: {what}: {verdict['value']:g}, at most {verdict['at_most']:g}",
                "" if verdict["met"] else "MISSED",
            )


if __name__ == "__main__":
    main()

"""`tightrope perplexity`: the table that long-context model cards print, from a model loaded in the foreground."""

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from tightrope.backends.errors import BackendError
from tightrope.backends.settings import KVCacheDtype, ModelSettings
from tightrope.engine.console import printable
from tightrope.server.cli.failures import CommandFailed, UsageError
from tightrope.server.cli.perplexity.report import LayerRow, Report, Row

if TYPE_CHECKING:
    from tightrope.backends.protocol import Backend  # It imports torch.

DEFAULT_CONTEXTS = "512,1024,2048"
LAYER_TOKENS = 4096  # A comparison by layers runs as many for each layer, or one window if that is longer.
Quantized = Literal["q8", "q4"]
QUANTIZED: tuple[Quantized, ...] = ("q8", "q4")  # These can be compared with f16.


@dataclass(frozen=True, slots=True)
class Arguments:
    """What to measure, and where to write it."""

    text: Path
    contexts: tuple[int, ...]  # They ascend.
    max_tokens: int  # It holds for each context length; 0 is the whole text.
    compare_kv: tuple[Quantized, ...]
    json: Path | None
    plot: Path | None

    @classmethod
    def of(
        cls,
        text: str,
        contexts: str | None,
        max_tokens: int | None,
        compare_kv: str | None,
        json: str | None,
        plot: str | None,
    ) -> "Arguments":
        """From the command line. Raises UsageError, also when the results could not be written."""
        lengths = [word.strip() for word in (contexts or DEFAULT_CONTEXTS).split(",")]
        for word in lengths:
            if not word.isdecimal() or not 2 <= int(word) < 1 << 31:
                raise UsageError(f"--contexts: should be numbers from 2 up with commas between, not {word!r}")
        kinds = [word.strip() for word in compare_kv.split(",")] if compare_kv is not None else []
        for word in kinds:
            if word not in QUANTIZED:
                raise UsageError(f"--compare-kv: should be q8, q4 or q8,q4, not {word!r}")
        if plot is not None and not plot.endswith(".png"):
            raise UsageError(f"--plot: should be a file that ends in .png, not {plot!r}")
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot: draws with matplotlib, which is not installed: pip install matplotlib")
        return cls(
            text=Path(text).expanduser(),
            contexts=tuple(sorted({int(word) for word in lengths})),
            max_tokens=max_tokens or 0,
            compare_kv=tuple(kind for kind in QUANTIZED if kind in kinds),
            json=_output("--json", json),
            plot=_output("--plot", plot),
        )

    def fit(self, settings: ModelSettings) -> ModelSettings:
        """The settings with room for the longest context, where they leave it open. Raises UsageError."""
        longest = self.contexts[-1]
        if 0 < settings.max_model_len < longest:
            raise UsageError(f"--contexts: {longest} is longer than --max-model-len {settings.max_model_len}")
        if 0 < settings.cache.tokens < longest:
            raise UsageError(f"--contexts: {longest} is longer than --kv-cache-tokens {settings.cache.tokens}")
        if self.compare_kv and settings.cache.dtype != "auto":
            raise UsageError("--compare-kv chooses the caches itself; leave out --kv-cache")
        tokens = settings.cache.tokens or max(longest, settings.step_tokens_on("cpu"))
        cache = settings.cache.model_copy(update={"tokens": tokens})
        return settings.model_copy(update={"max_model_len": settings.max_model_len or longest, "cache": cache})


def perplexity(settings: ModelSettings, arguments: Arguments) -> int:
    """Measure, print the tables, and write what else was asked for. Raises CommandFailed in one line."""
    text = _read(arguments.text)
    try:
        with ExitStack() as stack:
            backends = [stack.enter_context(closing(backend)) for backend in _open(settings, arguments.compare_kv)]
            token_ids = backends[0].tokenizer.encode(text, parse_special=False, is_start=True)
            report = Report(backends[0].card, arguments.text.name, len(token_ids), arguments.compare_kv)
            _measure(backends, token_ids, arguments, report)
            if arguments.compare_kv:
                _measure_layers(backends[0], token_ids, arguments, report)
        _write(report, arguments)
    except BackendError as error:
        raise CommandFailed(str(error)) from None
    except OSError as error:
        raise CommandFailed(f"{error.filename}: can't be written: {error.strerror}") from None
    return 0


def _open(settings: ModelSettings, compare_kv: Sequence[Quantized]) -> "Iterator[Backend]":
    """The backend to measure, or one with an f16 cache and those to compare with it, on its weights if they can be."""
    from tightrope.backends.detect import open_backend
    from tightrope.backends.protocol import SharesWeights
    from tightrope.engine.process.child import load

    def opened(dtype: KVCacheDtype) -> "Backend":
        cache = settings.cache.model_copy(update={"dtype": dtype})
        return load(settings.model_copy(update={"cache": cache}), open_backend)

    yield (base := opened("f16" if compare_kv else settings.cache.dtype))
    if compare_kv and isinstance(base, SharesWeights):
        variants = base.variants()
        yield from (variants.variant([kind] * variants.num_layers) for kind in compare_kv)
    else:
        yield from map(opened, compare_kv)


def _measure(backends: "Sequence[Backend]", token_ids: Sequence[int], arguments: Arguments, report: Report) -> None:
    """Fill the report, and print it as it grows."""
    from tightrope.engine import perplexity as engine

    base, *others = backends
    bos = engine.window_bos(base.tokenizer)
    for context in arguments.contexts:
        if len(token_ids) + (bos is not None) < context:
            raise CommandFailed(f"{arguments.text}: holds {len(token_ids)} tokens, too few for a context of {context}")
    windows = {
        context: engine.cut_windows(token_ids, context, bos, arguments.max_tokens) for context in arguments.contexts
    }
    print("\n".join(map(printable, (*report.header_lines(), "", report.table_head()))), flush=True)
    total = sum(len(found) * (context - 1) for context, found in windows.items()) * len(backends)
    with tqdm(total=total, unit="tok", leave=False, disable=None) as bar:
        for context, found in windows.items():
            scores = engine.compare(base, others, found, lambda n: bar.update(n) and None)
            for backend, score in zip(backends, scores, strict=True):
                row = Row(
                    context=context,
                    cache=backend.card.cache_dtype,
                    bytes_per_token=backend.card.cache_token_bytes,
                    windows=len(found),
                    tokens=score.num_tokens,
                    perplexity=score.perplexity,
                    kl=None if backend is base else score.mean_divergence,
                    change=None if backend is base else score.perplexity / scores[0].perplexity - 1,
                )
                report.rows.append(row)
                _print_beside(bar, report.table_line(row))


def _measure_layers(base: "Backend", token_ids: Sequence[int], arguments: Arguments, report: Report) -> None:
    """The same at the longest context for each layer alone, where the backend can cache layers differently."""
    from tightrope.backends.protocol import SharesWeights
    from tightrope.engine import perplexity as engine

    if not isinstance(base, SharesWeights):
        return
    longest, variants = arguments.contexts[-1], base.variants()
    most = min(arguments.max_tokens or LAYER_TOKENS, LAYER_TOKENS)
    found = engine.cut_windows(token_ids, longest, engine.window_bos(base.tokenizer), most)
    total = engine.layer_runs(variants.num_layers) * len(arguments.compare_kv) * len(found) * (longest - 1)
    print(
        f"\neach layer's cache alone, {len(found) * longest} tokens in windows of {longest}\n{LayerRow.table_head()}",
        flush=True,
    )
    with tqdm(total=total, unit="tok", leave=False, disable=None) as bar:
        for kind in arguments.compare_kv:
            first, *scores = engine.compare_layers(base, variants, kind, found, lambda n: bar.update(n) and None)
            for layer, score in enumerate(scores):
                change = score.perplexity / first.perplexity - 1
                report.layers.append(LayerRow(layer, kind, longest, score.mean_divergence, change))
                _print_beside(bar, report.layers[-1].table_line())


def _print_beside(bar: "tqdm[object]", line: str) -> None:
    bar.write(line, file=sys.stdout)
    sys.stdout.flush()


def _write(report: Report, arguments: Arguments) -> None:
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.document(), indent=2) + "\n", "utf-8")
    if arguments.plot is not None:
        from tightrope.server.cli.perplexity.plot import draw

        draw(report.curves(), report.card.model_id, report.header_lines()[1:], arguments.plot)


# ---- files ----


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise CommandFailed(f"--text: can't read {path}: {(error.strerror or 'refused').lower()}") from None
    except UnicodeDecodeError:
        raise CommandFailed(f"--text: {path} is not UTF-8 text") from None


def _output(option: str, name: str | None) -> Path | None:
    """The path to write to, checked now: the measurement may take hours."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{option}: {path} can't be written: its folder must exist, and it must be a file")
    return path

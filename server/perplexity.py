"""`tightrope perplexity`: the table that long-context model cards print, from a model loaded in the foreground."""

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from tightrope.backends.errors import BackendError
from tightrope.backends.settings import KVCacheDtype, ModelSettings

if TYPE_CHECKING:
    from tightrope.backends.protocol import Backend, ModelCard  # it imports torch

DEFAULT_CONTEXTS = "512,1024,2048"
QUANTIZED: tuple[KVCacheDtype, ...] = ("q8", "q4")  # what can be compared with f16


class UsageError(Exception):
    """An argument can't be used; the message is one line that names it."""


class PerplexityError(Exception):
    """The measurement can't be made; the message is one line."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What to measure, and where to write it."""

    text: Path
    contexts: tuple[int, ...]  # ascending
    max_tokens: int  # for each context length; 0: the whole text
    compare_kv: tuple[KVCacheDtype, ...]
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
    ) -> "Wish":
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
        tokens = settings.cache.tokens or max(longest, settings.step_tokens)
        cache = settings.cache.model_copy(update={"tokens": tokens})
        return settings.model_copy(update={"max_model_len": settings.max_model_len or longest, "cache": cache})


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `kl` is the mean divergence in nats from the f16 cache, None where that isn't asked."""

    context: int
    cache: str
    bytes_per_token: float
    windows: int
    tokens: int  # predicted
    perplexity: float
    kl: float | None = None
    change: float | None = None  # of perplexity against the f16 cache, as a share


def perplexity(settings: ModelSettings, wish: Wish) -> int:
    """Measure, print the table, and write what else was asked for. Raises PerplexityError in one line."""
    text = _read(wish.text)
    try:
        with ExitStack() as stack:
            backends = [stack.enter_context(closing(backend)) for backend in _open(settings, wish)]
            return _measure(backends, text, wish)
    except BackendError as error:
        raise PerplexityError(str(error)) from None
    except OSError as error:  # the results' files
        raise PerplexityError(f"{error.filename}: can't be written: {error.strerror}") from None


def _open(settings: ModelSettings, wish: Wish) -> "Iterator[Backend]":
    from tightrope.backends.detect import open_backend
    from tightrope.engine.child import load

    for kind in ("f16", *wish.compare_kv) if wish.compare_kv else (settings.cache.dtype,):
        cache = settings.cache.model_copy(update={"dtype": kind})
        yield load(settings.model_copy(update={"cache": cache}), open_backend)


def _measure(backends: "Sequence[Backend]", text: str, wish: Wish) -> int:
    from tightrope.engine import perplexity as engine

    tokenizer = backends[0].tokenizer
    bos = engine.window_bos(tokenizer)
    token_ids = tokenizer.encode(text, parse_special=False, is_start=True)
    for context in wish.contexts:
        if len(token_ids) + (bos is not None) < context:
            raise PerplexityError(f"{wish.text}: holds {len(token_ids)} tokens, too few for a context of {context}")
    windows = {context: engine.cut_windows(token_ids, context, bos, wish.max_tokens) for context in wish.contexts}
    header = header_lines(backends[0].card, wish, len(token_ids))
    print("\n".join(header), end="\n\n")
    print(table_head(is_comparison=bool(wish.compare_kv)), flush=True)
    rows: list[Row] = []
    total = sum(len(found) * (context - 1) for context, found in windows.items()) * len(backends)
    with tqdm(total=total, unit="tok", leave=False, disable=None) as bar:
        for context, found in windows.items():
            scores = engine.compare(backends[0], backends[1:], found, lambda n: bar.update(n) and None)
            for backend, score in zip(backends, scores, strict=True):
                is_base = backend is backends[0]
                row = Row(
                    context=context,
                    cache=backend.card.cache_dtype,
                    bytes_per_token=backend.card.cache_token_bytes,
                    windows=len(found),
                    tokens=score.num_tokens,
                    perplexity=score.perplexity,
                    kl=None if is_base else score.mean_divergence,
                    change=None if is_base else score.perplexity / scores[0].perplexity - 1,
                )
                rows.append(row)
                tqdm.write(table_line(row, is_comparison=bool(wish.compare_kv)), file=sys.stdout)
                sys.stdout.flush()
    if wish.json is not None:
        wish.json.write_text(json.dumps(document(backends[0].card, wish, len(token_ids), rows), indent=2) + "\n")
    if wish.plot is not None:
        from tightrope.server.perplexity_plot import draw

        draw(curves(rows), backends[0].card.model_id, header[1:], wish.plot)
    return 0


# ---- what is written ----


def header_lines(card: "ModelCard", wish: Wish, num_tokens: int) -> list[str]:
    """Loader, RoPE and cache in use: all that the numbers depend on, beside the text."""
    return [
        f"model     {card.model_id} ({card.architecture}, {card.format})",
        f"context   {card.max_model_len} tokens served, trained for {card.trained_len}",
        f"cache     {', '.join(('f16', *wish.compare_kv)) if wish.compare_kv else card.cache_dtype}",
        *(f"note      {note}" for note in card.notes),
        f"text      {wish.text.name}, {num_tokens} tokens",
    ]


def table_head(*, is_comparison: bool) -> str:
    """The line above the table_lines."""
    head = "context  windows   tokens  perplexity"
    return head + "  cache  bytes/token     change   mean KL (nats)" if is_comparison else head


def table_line(row: Row, *, is_comparison: bool) -> str:
    """One row as text, in columns."""
    line = f"{row.context:>7}  {row.windows:>7}  {row.tokens:>7}  {row.perplexity:>10.4f}"
    if not is_comparison:
        return line
    line += f"  {row.cache:<5}  {row.bytes_per_token:>11.0f}"
    return line if row.kl is None or row.change is None else f"{line}  {row.change:>+7.3%}  {row.kl:>15.6f}"


def document(card: "ModelCard", wish: Wish, num_tokens: int, rows: Sequence[Row]) -> dict[str, object]:
    """The results for JSON. `change` is a share, `kl` in nats; both are null where there is nothing to compare."""
    return {
        "model": card.model_id,
        "architecture": card.architecture,
        "format": card.format,
        "trained_len": card.trained_len,
        "max_model_len": card.max_model_len,
        "notes": list(card.notes),
        "text": {"file": wish.text.name, "tokens": num_tokens},
        "rows": [asdict(row) for row in rows],
    }


def curves(rows: Sequence[Row]) -> Mapping[str, list[tuple[int, float]]]:
    """(context, perplexity) points by cache."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        found.setdefault(f"{row.cache} cache", []).append((row.context, row.perplexity))
    return found


# ---- files ----


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise PerplexityError(f"--text: can't read {path}: {(error.strerror or 'refused').lower()}") from None
    except UnicodeDecodeError:
        raise PerplexityError(f"--text: {path} is not UTF-8 text") from None


def _output(option: str, name: str | None) -> Path | None:
    """The path to write to, checked now: the measurement may take hours."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{option}: {path} can't be written: its folder must exist, and it must be a file")
    return path

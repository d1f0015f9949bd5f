"""What RoPE scaling does to perplexity, from 512 tokens to four times the trained window.

    python -m bench.rope MODEL [--scalings none,'yarn 2']

MODEL is a folder or file of a model that was trained without scaling. For each context length and scaling the same
text is predicted, cut into windows; the cache is f16, so that the scaling is all that differs. Each number is written
as soon as it is there, and a run that was interrupted goes on where it stopped; --fresh begins anew. On two cores a
model of 135M parameters takes about a quarter of an hour for each scaling, most of it at the longest context.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from tqdm import tqdm

from bench import report
from bench.english import NAME, english_text
from tightrope.backends.detect import open_backend
from tightrope.backends.protocol import Backend
from tightrope.backends.settings import CacheSettings, ModelSettings, RopeKind, RopeSettings
from tightrope.engine.perplexity import cut_windows, measure, window_bos
from tightrope.server.cli.perplexity.plot import draw

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
WORTH_SEEING = 4.0  # times the best perplexity; what is worse leaves the picture

Key = tuple[str, int]  # scaling, context length
Rows = dict[Key, dict[str, object]]


@dataclass(frozen=True, slots=True)
class Scaling:
    """A way to scale; the factor of ntk is alpha, with which theta becomes theta * alpha^(d / (d - 2))."""

    kind: RopeKind
    factor: float | None = None

    @property
    def name(self) -> str:
        return self.kind if self.factor is None else f"{self.kind} {self.factor:g}"


SCALINGS = (
    Scaling("none"),
    Scaling("linear", 2.0),
    Scaling("linear", 4.0),
    Scaling("ntk", 2.0),
    Scaling("ntk", 4.0),
    Scaling("dynamic", 2.0),
    Scaling("yarn", 2.0),
    Scaling("yarn", 4.0),
)


def measure_all(
    model: str, text: str, scalings: Sequence[Scaling], contexts: Sequence[int], tokens: int, rows: Rows
) -> Iterator[Rows]:
    """Add what `rows` lacks, short contexts first; yields after each number. At most `tokens` a number."""
    with tqdm(total=len(scalings) * len(contexts) * tokens, unit="tok", disable=None) as bar:
        for scaling in scalings:
            missing = [context for context in contexts if (scaling.name, context) not in rows]
            bar.update((len(contexts) - len(missing)) * tokens)
            if not missing:
                continue
            bar.set_description(scaling.name)
            with closing(_open(model, scaling, max(missing))) as backend:
                for context in missing:
                    done = bar.n
                    rows[scaling.name, context] = _row(backend, scaling, context, text, tokens, bar)
                    bar.update(done + tokens - bar.n)
                    yield rows


def _open(model: str, scaling: Scaling, window: int) -> Backend:
    settings = ModelSettings(
        model=model,
        max_model_len=window,
        cache=CacheSettings(tokens=window, dtype="f16"),
        rope=RopeSettings(kind=scaling.kind, factor=scaling.factor),
    )
    return open_backend(settings, lambda share: None)


def _row(
    backend: Backend, scaling: Scaling, context: int, text: str, tokens: int, bar: "tqdm[object]"
) -> dict[str, object]:
    token_ids = backend.tokenizer.encode(text, parse_special=False, is_start=True)
    windows = cut_windows(token_ids, context, window_bos(backend.tokenizer), tokens)
    score = measure(backend, windows, lambda n: bar.update(n) and None)
    return {
        "scaling": scaling.name,
        "context": context,
        "trained_windows": context / backend.card.trained_len,
        "windows": len(windows),
        "tokens": score.num_tokens,
        "perplexity": round(score.perplexity, 5),
    }


def table(rows: Rows, contexts: Sequence[int]) -> str:
    """A line for each scaling, a column for each context length, in GitHub's markdown."""
    names = list(dict.fromkeys(name for name, _ in rows))
    head = ["scaling", *(f"{context:,}" for context in contexts)]
    lines = [head, ["---"] + ["---:"] * len(contexts)]
    for name in names:
        found = (rows.get((name, context)) for context in contexts)
        lines.append([name, *("" if row is None else f"{row['perplexity']:.2f}" for row in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(rows: Rows, model: str, trained_len: int, tokens: int) -> None:
    """Draw bench/results/rope.png."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for (name, context), row in sorted(rows.items(), key=lambda item: item[0][1]):
        curves.setdefault(name, []).append((context, float(str(row["perplexity"]))))
    best = min(value for points in curves.values() for _, value in points)
    worst = max(value for points in curves.values() for _, value in points)
    draw(
        {name: curves[name] for name, _ in rows},
        f"{model}: perplexity by RoPE scaling",
        [f"{tokens:,} tokens of {NAME}", "no weights were tuned for any scaling; the cache is f16"],
        report.RESULTS / "rope.png",
        trained_len=trained_len,
        most=WORTH_SEEING * best if worst > WORTH_SEEING * best else None,
    )


def _known_rows(model: str, tokens: int) -> Rows:
    results = report.known("rope")
    if (results.get("model"), results.get("max_tokens")) != (model, tokens):
        return {}
    return {(row["scaling"], row["context"]): row for row in results["rows"]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or file of a model")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)), help="context lengths, with commas between")
    parser.add_argument("--scalings", help="some of them, such as none,'yarn 2'; default: all")
    parser.add_argument("--tokens", type=int, default=16384, help="most tokens for a context length, but one window")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results have")
    args = parser.parse_args(arguments)
    contexts = [int(word) for word in args.contexts.split(",")]
    wanted = None if args.scalings is None else args.scalings.split(",")
    scalings = [scaling for scaling in SCALINGS if wanted is None or scaling.name in wanted]
    model = args.model.rstrip("/").rpartition("/")[2]
    rows = {} if args.fresh else _known_rows(model, args.tokens)
    for found in measure_all(args.model, english_text(), scalings, contexts, args.tokens, rows):
        results = {"model": model, "text": NAME, "max_tokens": args.tokens, "rows": list(found.values())}
        report.write("rope", results)
    one = next(iter(rows.values()))
    trained_len = int(float(str(one["context"])) / float(str(one["trained_windows"])))
    print(table(rows, contexts))
    picture(rows, model, trained_len, args.tokens)


if __name__ == "__main__":
    main()

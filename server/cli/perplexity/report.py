"""What `tightrope perplexity` found, as lines of text, as JSON and as curves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tightrope.backends.protocol import ModelCard  # It imports torch.


@dataclass(frozen=True, slots=True)
class Row:
    """One context length with one cache; `kl` and `change` are None where there is nothing to compare with."""

    context: int
    cache: str
    bytes_per_token: float
    windows: int
    tokens: int  # Only predicted ones count.
    perplexity: float
    # It is the mean divergence, in nats, of the next token's distributions from those with the f16 cache.
    kl: float | None
    change: float | None  # It is a share of the perplexity with the f16 cache.


@dataclass(frozen=True, slots=True)
class LayerRow:
    """The same for one layer cached as `cache` and all others in f16."""

    layer: int
    cache: str
    context: int
    kl: float
    change: float

    @staticmethod
    def table_head() -> str:
        """The line above the table_lines."""
        return "layer  cache   change  mean KL (nats)"

    def table_line(self) -> str:
        """This row in columns."""
        return f"{self.layer:>5}  {self.cache:<5}  {self.change:>+7.3%}  {self.kl:>14.7f}"


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found, and what it was measured with."""

    card: "ModelCard"
    text: str  # It is the name of the text's file.
    text_tokens: int
    compare_kv: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)

    def header_lines(self) -> list[str]:
        """Loader, RoPE and cache in use: all that the numbers depend on."""
        card = self.card
        return [
            f"model     {card.model_id} ({card.architecture}, {card.format})",
            *([] if card.fault is None else [f"slow      {card.fault}"]),
            f"context   {card.max_model_len} tokens served, trained for {card.trained_len}",
            f"cache     {', '.join(('f16', *self.compare_kv)) if self.compare_kv else card.cache_dtype}",
            *(f"note      {note}" for note in card.notes),
            f"text      {self.text}, {self.text_tokens} tokens",
        ]

    def table_head(self) -> str:
        """The line above the table_lines."""
        head = "context  windows   tokens  perplexity"
        return f"{head}  cache  bytes/token   change  mean KL (nats)" if self.compare_kv else head

    def table_line(self, row: Row) -> str:
        """A row in columns."""
        line = f"{row.context:>7}  {row.windows:>7}  {row.tokens:>7}  {row.perplexity:>10.4f}"
        if not self.compare_kv:
            return line
        line = f"{line}  {row.cache:<5}  {row.bytes_per_token:>11.0f}"
        return line if row.kl is None or row.change is None else f"{line}  {row.change:>+7.3%}  {row.kl:>14.6f}"

    def document(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        card = self.card
        return {
            "model": card.model_id,
            "architecture": card.architecture,
            "format": card.format,
            "trained_len": card.trained_len,
            "max_model_len": card.max_model_len,
            "notes": list(card.notes),
            "text": {"file": self.text, "tokens": self.text_tokens},
            "rows": [asdict(row) for row in self.rows],
            "layers": [asdict(row) for row in self.layers],
        }

    def curves(self) -> Mapping[str, list[tuple[int, float]]]:
        """(context, perplexity) points by cache."""
        found: dict[str, list[tuple[int, float]]] = {}
        for row in self.rows:
            found.setdefault(f"{row.cache} cache", []).append((row.context, row.perplexity))
        return found

"""What sampling fields ask of the engine, under whatever names of server/fields/names.py they come.

The dialects: OpenAI and vLLM, Aphrodite, TabbyAPI, text-generation-webui ("ooba"), KoboldCpp, llama.cpp's server,
Ollama. Clients send most values under several names at once and nearly all of them at their neutral values; of several
names the first that is there counts. A field is honoured, refused with its name, or listed with the reason why it
changes nothing; nothing else is read here, and names that this module doesn't know are left alone.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.limits import MAX_BANNED_CHARS, MAX_BANNED_STRINGS, MAX_BREAKER_BYTES
from tightrope.engine.sampler.steps import ORDERED, SAMPLER_ORDER, SamplingParams, in_order
from tightrope.engine.types import Guidance, StopRules
from tightrope.server.fields import names
from tightrope.server.fields.names import Ignored
from tightrope.server.fields.numbers import MAX_INT, Number, is_number, shown
from tightrope.server.fields.sampler_order import READERS

MAX_STOPS = 1024  # The engine looks for each of them after each token.
MAX_BREAKERS = 16384
MAX_XTC_IGNORED = 256  # All candidates are compared with each of them.

Fields = Mapping[str, Any]  # A request's JSON may hold anything, and its types are checked here.


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request asks of the sampler, and the fields that asked for something else."""

    params: SamplingParams
    stop: StopRules
    guidance: Guidance | None
    ignored: tuple[Ignored, ...]
    bent: tuple[Ignored, ...]  # For what fields were taken that have a plain meaning and another form.


def read_sampling(
    given: Fields, vocab_size: int, *, max_tokens: int | None = None, more_stops: Sequence[str] = ()
) -> Sampling:
    """The engine's parameters for the fields of a request; null means absent, and unknown names are passed over.

    max_tokens: where the request names none; more_stops: those of the prompt format. Raises InvalidRequest with the
    name of the first field that is mistyped, out of range, or asks for what can't be had.
    """
    reading = _Reading({name: value for name, value in given.items() if value is not None}, vocab_size)
    reading.refuse_rope()
    reading.refuse_not_built()
    reading.numbers()
    reading.temperature()
    reading.adaptive_p()
    reading.order()
    reading.bans()
    if reading.targets.get("dry_multiplier"):
        reading.breakers()
    reading.ignored_by_xtc()
    reading.without_effect()
    guidance = reading.guidance()
    stop = reading.stop_rules(max_tokens, more_stops)
    return Sampling(SamplingParams(**reading.targets), stop, guidance, tuple(reading.ignored), tuple(reading.bent))


def draws(given: Fields) -> bool:
    """Whether fields put a step on that only a drawn token can feel; of the temperature, only its range."""
    reading = _Reading({name: value for name, value in given.items() if value is not None}, MAX_INT)
    reading.numbers()
    reading.temperature()
    reading.adaptive_p()
    params = SamplingParams(**reading.targets)
    others = ("min_keep", "seed")  # These are of no effect by themselves.
    return any(step.is_on(params) for step in in_order(params) if step.stage >= ORDERED and step.name not in others)


@dataclass(slots=True)
class _Reading:
    """One request on its way to the engine."""

    given: Fields
    vocab_size: int
    targets: dict[str, Any] = field(default_factory=dict)  # These are fields of SamplingParams.
    ignored: list[Ignored] = field(default_factory=list)
    bent: list[Ignored] = field(default_factory=list)

    def first(self, names: Iterable[str]) -> str | None:
        """The name that counts, of those that are there; the others are listed where they say something else."""
        there = [name for name in names if name in self.given]
        for other in there[1:]:
            if self.given[other] != self.given[there[0]]:
                self.ignored.append((other, f"{there[0]} came too, and counts"))
        return there[0] if there else None

    def lists(self, names: Iterable[str]) -> Iterator[tuple[str, object]]:
        """The names that are there with something in them, and their values: of lists, each counts."""
        for name in names:
            if name in self.given and self.given[name] not in ("", [], {}):
                yield name, self.given[name]

    def number(self, number: Number) -> float | None:
        """None where the field is absent or off."""
        name = self.first(number.names)
        if name is None or (is_number(self.given[name]) and self.given[name] in number.off):
            return None
        return number.read(name, self.given[name])

    def numbers(self) -> None:
        for number in names.NUMBERS:
            if number.part_of is not None and not self.targets.get(number.part_of):
                continue
            value = self.number(number)
            if value is not None:
                self.targets[number.target] = value
        if self.targets.get("top_k"):
            self.targets["top_k"] = min(self.targets["top_k"], self.vocab_size)
        if self.targets.get("min_keep"):
            self.targets["min_keep"] = min(self.targets["min_keep"], self.vocab_size)

    def temperature(self) -> None:
        """Greedy where nothing is to be sampled; the interval of a dynamic temperature as a middle and a range."""
        if self.flag(("do_sample",), default=True) is False:
            self.targets["temperature"] = 0.0
        is_on = self.flag(("dynamic_temperature",))
        if is_on is False or self.targets.get("temperature") == 0:
            return
        low_name, high_name = self.first(names.DYNATEMP_LOW), self.first(names.DYNATEMP_HIGH)
        if (low_name is None) != (high_name is None):
            self.ignored.append((low_name or high_name or "", "the other end of the range is missing"))
        middle = self.targets.get("temperature", 1.0)
        low = high = middle
        if low_name is not None and high_name is not None:
            low = names.TEMPERATURE.read(low_name, self.given[low_name])
            high = names.TEMPERATURE.read(high_name, self.given[high_name])
        if low > high:
            raise InvalidRequest(f"{low_name} must not be above {high_name} ({high:g}), not {low:g}", low_name)
        if low < high:
            self.targets |= {"temperature": (low + high) / 2, "dynatemp_range": (high - low) / 2}
            if self.number(names.RANGE) not in (None, 0, (high - low) / 2):
                self.ignored.append(("dynatemp_range", f"{low_name} and {high_name} came too, and count"))
        elif (half := self.number(names.RANGE)) is not None:
            self.targets["dynatemp_range"] = half
        if self.targets.get("dynatemp_range") and (exponent := self.number(names.EXPONENT)) is not None:
            self.targets["dynatemp_exponent"] = exponent

    def adaptive_p(self) -> None:
        """Off below 0; mirostat steers alone."""
        target = self.number(names.ADAPTIVE_TARGET)
        if target is None or target < 0:
            return
        decay = self.number(names.ADAPTIVE_DECAY)
        if self.targets.get("mirostat_mode"):
            self.ignored.append(("adaptive_target", "mirostat_mode steers already"))
            return
        self.targets["adaptive_target"] = target
        if decay is not None:
            self.targets["adaptive_decay"] = decay

    def order(self) -> None:
        """One list of steps, whatever the dialect; what a llama.cpp list leaves out is off."""
        for name, read in READERS.items():
            if name not in self.given:
                continue
            order, left_out, unknown = read(name, self.given[name])
            self.ignored += [(name, f"there is no step {step!r:.40}") for step in unknown]
            self.targets["order"] = order
            for target in sorted(left_out & self.targets.keys()):
                del self.targets[target]
                self.ignored.append((target, f"{name} leaves it out"))
            break
        if self.flag(("temperature_last",)):
            order = self.targets.get("order") or SAMPLER_ORDER
            order = (*order, *(step for step in SAMPLER_ORDER if step not in order))
            self.targets["order"] = (*(step for step in order if step != "temperature"), "temperature")
        if self.targets.get("order") == SAMPLER_ORDER[: len(self.targets.get("order", ()))]:
            self.targets.pop("order", None)

    def bans(self) -> None:
        bias, banned = self._bias()
        phrases: list[tuple[str, object]] = []
        for name, value in self.lists(names.BANNED_TOKENS):
            phrases.append((name, [item for item in value if _is_phrase(item)] if isinstance(value, list) else []))
            ids = [item for item in value if not _is_phrase(item)] if isinstance(value, list) else value
            banned += self._known_ids(name, _ids(name, ids))
        for name, value in self.lists(names.ALLOWED_TOKENS):
            allowed = set(self._known_ids(name, _ids(name, value)))
            if not allowed:
                raise InvalidRequest(f"{name}: none of them is below the vocabulary's {self.vocab_size}", name)
            banned += [token_id for token_id in range(self.vocab_size) if token_id not in allowed]
        if bias:
            self.targets["logit_bias"] = bias
        if banned:
            self.targets["banned_tokens"] = tuple(dict.fromkeys(banned))
        texts: list[str] = []
        for name, value in (*phrases, *self.lists(names.BANNED_STRINGS)):
            texts += [text for text in _texts(name, value) if text]
            if len(texts) > MAX_BANNED_STRINGS:
                raise InvalidRequest(f"{name}: at most {MAX_BANNED_STRINGS} strings, not {len(texts)}", name)
            if longest := max((len(text) for text in texts if len(text) > MAX_BANNED_CHARS), default=0):
                raise InvalidRequest(f"{name}: at most {MAX_BANNED_CHARS} characters each, not {longest}", name)
        if texts:
            self.targets["banned_strings"] = tuple(dict.fromkeys(texts))

    def _bias(self) -> tuple[dict[int, float], list[int]]:
        """Biases by token id, and the ids whose bias is `false`: banned."""
        name = "logit_bias"
        pairs = self.given.get(name) or {}
        if isinstance(pairs, dict):
            pairs = [pair for pair in pairs.items() if pair[1] is not None]
        if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise InvalidRequest(f"{name} must be an object or a list of pairs, not {shown(pairs)}", name)
        values: dict[int, float | bool] = {}
        for key, value in pairs:
            is_ban = value is False
            if not is_ban and not (is_number(value) and -100 <= value <= 100):
                raise InvalidRequest(f"{name}: {shown(value)} for token {shown(key)} is not within -100 and 100", name)
            values[_token_id(name, key)] = value
        known = self._known_ids(name, values)
        return (
            {token_id: values[token_id] for token_id in known if values[token_id] is not False},
            [token_id for token_id in known if values[token_id] is False],
        )

    def _known_ids(self, name: str, token_ids: Iterable[int]) -> list[int]:
        """The ids that are in the vocabulary. Clients without our tokenizer send others; those are listed."""
        token_ids = list(token_ids)
        known = [token_id for token_id in token_ids if 0 <= token_id < self.vocab_size]
        if unknown := [token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size]:
            some = ", ".join(map(str, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
            self.ignored.append((name, f"no token ids below {self.vocab_size}: {some}"))
        return known

    def ignored_by_xtc(self) -> None:
        """Token ids, or true for the model's end tokens."""
        value, most = self.given.get(names.XTC_IGNORED), MAX_XTC_IGNORED
        if value in (None, False, "", []):
            return
        if not self.targets.get("xtc_probability"):
            self.ignored.append((names.XTC_IGNORED, "XTC is off"))
        elif value is True:
            self.targets["xtc_spares_ends"] = True
        else:
            ids = self._known_ids(names.XTC_IGNORED, _ids(names.XTC_IGNORED, value))
            if len(ids) > most:
                raise InvalidRequest(f"{names.XTC_IGNORED}: at most {most} tokens, not {len(ids)}", names.XTC_IGNORED)
            self.targets["xtc_ignore_tokens"] = tuple(dict.fromkeys(ids))

    def breakers(self) -> None:
        name = "dry_sequence_breakers"
        if name not in self.given:
            return
        texts = list(dict.fromkeys(text for text in _texts(name, self.given[name]) if text))
        if len(texts) > MAX_BREAKERS:
            raise InvalidRequest(f"{name}: at most {MAX_BREAKERS} strings, not {len(texts)}", name)
        if longest := max((size for text in texts if (size := len(text.encode())) > MAX_BREAKER_BYTES), default=0):
            raise InvalidRequest(f"{name}: at most {MAX_BREAKER_BYTES} bytes each, not {longest}", name)
        self.targets[name] = tuple(texts)

    def guidance(self) -> Guidance | None:
        """A negative prompt without a scale, or with a scale of 1, changes nothing."""
        scale = self.number(names.GUIDANCE)
        text = self.given.get(names.NEGATIVE, "")
        if not isinstance(text, str):
            raise InvalidRequest(f"{names.NEGATIVE} must be a string, not {shown(text)}", names.NEGATIVE)
        if scale is not None:
            return Guidance(text, scale)
        if text:
            self.ignored.append((names.NEGATIVE, "guidance_scale is 1"))
        return None

    def refuse_rope(self) -> None:
        for name in sorted(names.ROPE & self.given.keys()):
            raise InvalidRequest(f"{name}: positions are scaled alike for all requests, as set at the start", name)

    def refuse_not_built(self) -> None:
        for name, (neutral, why) in names.NOT_BUILT.items():
            if self.given.get(name, neutral) != neutral:
                raise InvalidRequest(f"{name}: {why}", name)

    def without_effect(self) -> None:
        for name, (is_neutral, why) in names.WITHOUT_EFFECT.items():
            if name not in self.given:
                continue
            value = self.given[name]
            if not (isinstance(value, bool | int | float) and is_neutral(value)):
                self.ignored.append((name, why))
        if self.given.get("repetition_decay") and not self.targets.get("penalty_range"):
            self.ignored.append(("repetition_decay", "the penalty's range is all there is, and has no end to fade at"))

    def _max_tokens(self, default: int | None) -> int | None:
        """The most tokens of an answer; what no window holds is no bound."""
        name = self.first(names.MAX_TOKENS.names)
        if self.flag((names.TO_THE_WINDOW,)):
            return None
        if name is None:
            return default
        value = self.given[name]
        if is_number(value) and (value > MAX_INT or value in names.MAX_TOKENS.off):
            return None
        if value == 0 and name == names.OLLAMA_MAX_TOKENS:
            return None
        return int(names.MAX_TOKENS.read(name, value))

    def _stops(self, name: str) -> list[str]:
        """A text or several; none is what empty ones and nulls ask for."""
        value = self.given[name]
        strings = [value] if isinstance(value, str) else value
        if not isinstance(strings, list) or not all(isinstance(text, str | None) for text in strings):
            raise InvalidRequest(f"{name} must be a string or a list of strings, not {shown(value)}", name)
        asking = [text for text in strings if text]
        if len(asking) < len(strings):
            self.bent.append((name, "empty texts are passed over"))
        return asking

    def flag(self, names: Sequence[str], *, default: bool | None = None) -> bool | None:
        name = self.first(names)
        if name is None:
            return default
        value = self.given[name]
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} must be true or false, not {shown(value)}", name)
        return value

    def stop_rules(self, max_tokens: int | None, more_stops: Sequence[str]) -> StopRules:
        max_tokens = self._max_tokens(max_tokens)
        min_tokens = int(self.number(names.MIN_TOKENS) or 0)
        if max_tokens is not None and min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens must not be above max_tokens ({max_tokens})", "min_tokens")
        strings: list[str] = []
        for name in names.STOPS:
            if name in self.given:
                strings = list(dict.fromkeys((*strings, *self._stops(name))))
                if len(strings) > MAX_STOPS:
                    raise InvalidRequest(f"{name}: at most {MAX_STOPS} stop strings, not {len(strings)}", name)
        token_ids = _ids("stop_token_ids", self.given.get("stop_token_ids", []))
        return StopRules(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            strings=tuple(dict.fromkeys((*strings, *more_stops))),
            token_ids=tuple(self._known_ids("stop_token_ids", token_ids)),
            ignore_eos=any(self.flag((name,)) or False for name in names.IGNORE_EOS),
            keep_stop_text=self.flag(names.KEEP_STOP) or False,
        )


def _texts(name: str, value: object) -> list[str]:
    """A list of texts, as a list, as JSON in a string, or with commas between them."""
    texts = value
    if isinstance(value, str):
        texts = value.split(",") if not value.lstrip().startswith("[") else _from_json(name, value)
    if isinstance(texts, list):
        texts = [text for text in texts if text is not None]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"{name} must be a list of strings, not {shown(value)}", name)
    return texts


def _ids(name: str, value: object) -> list[int]:
    """Token ids as a list, or with commas between them."""
    if isinstance(value, str):
        value = [text for text in value.strip().removeprefix("[").removesuffix("]").split(",") if text.strip()]
    if not isinstance(value, list):
        raise InvalidRequest(f"{name} must be a list of token ids, not {shown(value)}", name)
    return [_token_id(name, item) for item in value]


def _is_phrase(item: object) -> bool:
    """Whether an item among banned tokens is a text, as KoboldCpp has them, and no id."""
    return isinstance(item, str) and not item.strip().removeprefix("-").isdecimal()


def _token_id(name: str, value: object) -> int:
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal() and value.isascii() and len(value) < 20:
        return int(value)
    if is_number(value) and abs(value) < MAX_INT and value == int(value):
        return int(value)
    raise InvalidRequest(f"{name}: {shown(value)} is no token id", name)


def _from_json(name: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{name} must be JSON where it begins with a bracket, not {shown(text)}", name) from None

"""The Dockerfile as docker reads it: its stages, for either device, with what each has of variables and packages."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from checkout import ROOT

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: what it begins with, an image or another stage, and its instructions as (name, arguments)."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        """The arguments of all instructions of this name."""
        return [arguments for found, arguments in self.instructions if found == name]


def instructions(text: str) -> list[tuple[str, str]]:
    """All (name, arguments) with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, arguments) for name, arguments in pairs]


def defaults() -> dict[str, str]:
    """The arguments of the build, which stand in front of the first stage."""
    found: dict[str, str] = {}
    for name, arguments in instructions((ROOT / "Dockerfile").read_text("utf-8")):
        if name == "FROM":
            break
        assert name == "ARG"
        key, _, value = arguments.partition("=")
        found[key] = value
    return found


@cache
def stages(device: str) -> tuple[Stage, ...]:
    """All stages, the last one the image's, as a build for this device names them."""
    found: list[Stage] = []
    for name, arguments in instructions((ROOT / "Dockerfile").read_text("utf-8")):
        if name == "FROM":
            base, *alias = re.sub(r"\$\{DEVICE\}", device, arguments).split()
            assert not alias or (alias[0] == "AS" and len(alias) == 2)
            found.append(Stage(base, alias[1] if alias else ""))
        elif found:
            found[-1].instructions.append((name, arguments))
    return tuple(found)


def chain(stage: Stage, device: str) -> list[Stage]:
    """A stage and those below it, the lowest first, whose base is an image."""
    below = [other for other in stages(device) if other.name == stage.base]
    return [*chain(below[0], device), stage] if below else [stage]


def used(device: str) -> list[Stage]:
    """The stages that a build for this device runs."""
    wanted, found = [stages(device)[-1]], []
    while wanted:
        found += (new := chain(wanted.pop(), device))
        names = {words[0].removeprefix("--from=") for one in new for words in map(str.split, one.all("COPY"))}
        wanted += [other for other in stages(device) if other.name in names and other not in found]
    return found


def environment(stage: Stage, device: str) -> dict[str, str]:
    """What a process in this stage finds, but for what the images below it set."""
    pairs = [pair for one in chain(stage, device) for line in one.all("ENV") for pair in _pairs(line)]
    return dict(pairs)


def packages(stage: Stage, device: str) -> set[str]:
    """The packages that are installed in a stage or below it."""
    runs = [run for one in chain(stage, device) for run in one.all("RUN")]
    lists = [re.findall(r"apt-get install ([^&]*)", run) for run in runs]
    return {word for found in lists for words in found for word in words.split() if not word.startswith("--")}


def command(arguments: str) -> list[str]:
    """The words of an ENTRYPOINT, or of a HEALTHCHECK behind its options."""
    words = json.loads(arguments[arguments.index("[") :])
    assert isinstance(words, list)
    return words


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    for key, quoted, plain in re.findall(r'(\w+)=(?:"([^"]*)"|(\S*))', line):
        yield key, quoted or plain

"""The words of TGI's launcher, and what each means here: a flag of the same name, and a variable in capitals.

Flags are always understood. Variables are read where `tgi-environment` is set, as it is in the image: bare names such
as PORT, HOSTNAME or API_KEY belong to other programs as well, and what a shell has set for one of them must not decide
where another listens, or with which key. Docker itself sets HOSTNAME, to a name of the container.

Source: text-generation-inference 3.3.7, docs/source/reference/launcher.md, launcher/src/main.rs and, for the host names
that are no addresses, router/src/server.rs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

OFF = frozenset({"", "0", "false", "f", "no", "n", "off"})  # In a flag's variable they mean that it isn't given.


@dataclass(frozen=True, slots=True)
class Word:
    """One word. `remark` says how a taken one differs, why an idle one changes nothing, what to do about a refused one.

    option: ours that a taken word means, among whose spellings it is. short: its spelling with one hyphen.
    """

    kind: Literal["taken", "idle", "refused"]
    remark: str = ""
    option: str = ""
    is_flag: bool = False
    short: str = ""


def taken(option: str, remark: str = "") -> Word:
    return Word("taken", remark, option)


def idle(remark: str, *, is_flag: bool = False, short: str = "") -> Word:
    return Word("idle", remark, is_flag=is_flag, short=short)


def refused(remark: str, *, is_flag: bool = False) -> Word:
    return Word("refused", remark, is_flag=is_flag)


_ONE_PROCESS = "ranks of a model are processes of one engine, and nothing of them listens on a port or socket"
_CONTINUOUS = "a prompt is taken in beside the answers under way, so that batches don't wait to be filled"

WORDS: Mapping[str, Word] = {  # They stand in the order of the launcher's own page.
    "model-id": taken("model", "without it the bundled demo model is served"),
    "revision": taken("revision"),
    "validation-workers": idle("texts are read by as many threads as are of use"),
    "sharded": taken("tensor-parallel", "true is all cards, false is one; a number by num-shard counts instead"),
    "num-shard": taken("tensor-parallel", "llama.cpp spreads the layers of its GGUF files over cards without it"),
    "quantize": taken("quantize", "a model in another format is refused: nothing is quantized while loading"),
    "speculate": idle("there is no speculation, which would change the speed alone"),
    "dtype": taken("dtype", "for folders on a card: elsewhere it changes nothing, which a line at the start tells"),
    "kv-cache-dtype": refused("keys and values in 8 bits are --kv-cache q8"),
    "trust-remote-code": idle("no code of a model is ever run, with leave or without", is_flag=True),
    "max-concurrent-requests": taken("max-waiting", "beside those that run"),
    "max-best-of": taken("max-best-of"),
    "max-stop-sequences": taken("max-stop-sequences"),
    "max-top-n-tokens": taken("max-top-n-tokens"),
    "max-input-tokens": taken("max-input-tokens"),
    "max-input-length": taken("max-input-tokens"),
    "max-total-tokens": taken("max-model-len"),
    "waiting-served-ratio": idle(_CONTINUOUS),
    "max-batch-prefill-tokens": taken("step-tokens", "longer prompts take several steps"),
    "max-batch-total-tokens": taken("kv-cache-tokens"),
    "max-waiting-tokens": idle(_CONTINUOUS),
    "max-batch-size": taken("max-num-seqs"),
    "cuda-graphs": idle("the sizes of batches that are recorded follow from --max-num-seqs"),
    "hostname": taken("host", "a variable that is neither an address nor localhost is passed over, as Docker sets it"),
    "port": taken("port"),
    "prometheus-port": idle("/metrics is served at the server's own port"),
    "shard-uds-path": idle(_ONE_PROCESS),
    "master-addr": idle(_ONE_PROCESS),
    "master-port": idle(_ONE_PROCESS),
    "huggingface-hub-cache": taken("hub-cache"),
    "weights-cache-override": taken("hub-cache"),
    "disable-custom-kernels": idle("the kernels are those that this machine can run", is_flag=True),
    "cuda-memory-fraction": taken("gpu-memory-fraction"),
    "rope-scaling": taken("rope-scaling", "`dynamic` alone is by 1; other kinds want a factor"),
    "rope-factor": taken("rope-factor", "alone it means linear scaling"),
    "json-output": idle("the log has plain lines", is_flag=True),
    "otlp-endpoint": idle("no traces are sent; /metrics has the times of requests"),
    "otlp-service-name": idle("no traces are sent; /metrics has the times of requests"),
    "cors-allow-origin": taken("cors-origins", "no origin unless it is named"),
    "api-key": taken("api-key"),
    "watermark-gamma": taken("watermark-gamma"),
    "watermark-delta": taken("watermark-delta"),
    "ngrok": refused("no tunnel is opened; run one beside it, and name its host with --allowed-hosts", is_flag=True),
    "ngrok-authtoken": idle("no tunnel is opened"),
    "ngrok-edge": idle("no tunnel is opened"),
    "tokenizer-config-path": refused("the tokenizer is the model's own; --chat-template FILE sets another template"),
    "disable-grammar-support": refused(
        "shapes of answers are always served, each tried within 5 s and 512 MiB first; leave it out", is_flag=True
    ),
    "env": idle("`tightrope doctor` tells of the machine", is_flag=True, short="-e"),
    "max-client-batch-size": taken("max-client-batch-size"),
    "lora-adapters": taken("lora", "NAME=PATH; adapters are never downloaded"),
    "usage-stats": idle("nothing is ever reported to anyone"),
    "payload-limit": taken("max-body-bytes"),
    "enable-prefill-logprobs": idle("they are there whenever a request asks for them", is_flag=True),
    "graceful-termination-timeout": idle("answers under way get 60 s", short="-g"),
    "log-level": taken("log-level", "one level for all"),
}


def variable(word: str) -> str:
    """The environment variable of a word: "max-total-tokens" is MAX_TOTAL_TOKENS."""
    return word.replace("-", "_").upper()


def from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the launcher's variables say, by their words. An empty one isn't set, but for the key, which protects."""
    values = {word: environ[variable(word)] for word in WORDS if variable(word) in environ and word != "env"}
    number = values.get("num-shard")
    if number and (values.get("sharded", "").lower() in OFF) == (number == "1"):
        values.pop("sharded", None)  # Both say the same, and the number says it better.
    return {word: value for word, value in values.items() if _is_given(word, value)}


def idle_words(arguments: Mapping[str, str], environ: Mapping[str, str]) -> list[str]:
    """Lines on what was given and changes nothing. `arguments` may hold options of ours as well, by their names."""
    given = [(f"--{word}", word) for word in arguments] + [(variable(word), word) for word in from_environment(environ)]
    return [f"{label} changes nothing: {WORDS[word].remark}" for label, word in given if _is_idle(word)]


def words_without_option() -> Iterator[tuple[str, Word]]:
    """Those that the command line must learn beside our own options."""
    return ((name, word) for name, word in WORDS.items() if word.kind != "taken")


def _is_idle(word: str) -> bool:
    return word in WORDS and WORDS[word].kind == "idle"


def _is_given(word: str, value: str) -> bool:
    if WORDS[word].is_flag:
        return value.lower() not in OFF
    if word == "hostname":
        return value == "localhost" or _is_address(value)
    return value != "" or word == "api-key"


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True

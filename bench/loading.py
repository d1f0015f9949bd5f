"""How long a model of 7B shape takes to load, cold, beside reading its file: python -m bench.loading [--layers N]

A folder of random weights is written for each format, with the layers' sizes of Llama 2 7B; none of the work depends on
what weights know. Every load is a process of its own, after the file's pages have been dropped from memory, and so is
every plain reading of the file, by turns. A core is to repack LEAST_GB_S gigabytes of the file a second, or a load
is to take at most MOST_OF_READING times as long as the reading, whichever is slower.
"""

import argparse
import json
import mmap
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from bench import report
from bench.stats import spread

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
GROUP, NESTED = 128, 256  # inputs that share a scale; nf4's has 64, and so many scales share a factor
LEAST_GB_S, MOST_OF_READING = 0.5, 1.3

Part = tuple[str, str, tuple[int, ...], Callable[[], bytes]]  # name, dtype, shape, and the bytes when they are needed


@dataclass(frozen=True, slots=True)
class Draw:
    """Random tensors of one linear [N, K]."""

    random: np.random.Generator
    name: str
    outputs: int
    inputs: int

    def words(self, part: str, *shape: int) -> Part:
        return f"{self.name}.{part}", "I32", shape, partial(self.random.bytes, 4 * int(np.prod(shape)))

    def scales(self, part: str, dtype: str, *shape: int) -> Part:
        kind = np.float16 if dtype == "F16" else np.float32
        return f"{self.name}.{part}", dtype, shape, lambda: np.full(shape, 0.002, kind).tobytes()

    def exl2(self) -> list[Part]:
        """Half of the groups with 5 bits, half with 4, and scales for each 32 inputs as in files of 4.5 bits."""
        groups = self.inputs // 32
        bits = np.where(np.arange(groups) < groups // 2, 5, 4)
        starts = np.cumsum(bits) - bits
        rows = self.random.permutation(self.inputs).astype(np.int32)
        pairs = np.stack((bits, starts), 1).astype(np.int16)
        return [
            self.words("q_weight", int(bits.sum()), self.outputs),
            self.words("q_scale", groups, self.outputs // 8),
            self.scales("q_scale_max", "F16", groups),
            (f"{self.name}.q_groups", "I16", (2 * groups,), pairs.tobytes),
            (f"{self.name}.q_invperm", "I32", (self.inputs,), rows.tobytes),
        ]

    def gptq(self) -> list[Part]:
        """With inputs in an order of their own (act-order)."""
        groups = self.inputs // GROUP
        order = (self.random.permutation(self.inputs) // GROUP).astype(np.int32)
        return [
            self.words("qweight", self.inputs // 8, self.outputs),
            self.words("qzeros", groups, self.outputs // 8),
            self.scales("scales", "F16", groups, self.outputs),
            (f"{self.name}.g_idx", "I32", (self.inputs,), order.tobytes),
        ]

    def awq(self) -> list[Part]:
        groups = self.inputs // GROUP
        return [
            self.words("qweight", self.inputs, self.outputs // 8),
            self.words("qzeros", groups, self.outputs // 8),
            self.scales("scales", "F16", groups, self.outputs),
        ]

    def nf4(self) -> list[Part]:
        """With scales of eight bits (double quantization)."""
        count = self.outputs * self.inputs
        blocks = count // 64
        state = {
            "shape": [self.outputs, self.inputs],
            "blocksize": 64,
            "nested_blocksize": NESTED,
            "nested_offset": 0.01,
        }
        text = json.dumps(state).encode()
        book, nested = np.linspace(-1, 1, 16, dtype=np.float32), np.linspace(-1, 1, 256, dtype=np.float32)
        return [
            (f"{self.name}.weight", "U8", (count // 2, 1), partial(self.random.bytes, count // 2)),
            (f"{self.name}.weight.absmax", "U8", (blocks,), partial(self.random.bytes, blocks)),
            (f"{self.name}.weight.quant_map", "F32", (16,), book.tobytes),
            (f"{self.name}.weight.nested_quant_map", "F32", (256,), nested.tobytes),
            self.scales("weight.nested_absmax", "F32", -(-blocks // NESTED)),
            (f"{self.name}.weight.quant_state.bitsandbytes__nf4", "U8", (len(text),), lambda: text),
        ]

    def bf16(self) -> list[Part]:
        count = self.outputs * self.inputs
        made = (self.random.integers(0, 1 << 15, 1 << 16, np.uint16) & 0x1FF) | 0x3C00  # about a hundredth
        return [(f"{self.name}.weight", "BF16", (self.outputs, self.inputs), lambda: np.resize(made, count).tobytes())]


FORMS: Mapping[str, tuple[Callable[[Draw], list[Part]], Mapping[str, object] | None]] = {
    "exl2": (Draw.exl2, {"quant_method": "exl2", "bits": 4.5}),
    "gptq": (Draw.gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": True}),
    "awq": (Draw.awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "nf4": (Draw.nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bf16": (Draw.bf16, None),
}


def write(folder: Path, form: str, layers: int) -> Path:
    """A checkpoint of `layers` layers; its embedding and head are plain."""
    from bench.small_models import write_tokenizer

    linear, settings = FORMS[form]
    random = np.random.default_rng(1)
    hidden, inner, vocab = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    table = Draw(random, "model.embed_tokens", vocab, hidden)

    def norm(name: str) -> Part:
        return f"{name}.weight", "BF16", (hidden,), lambda: bytes((0x80, 0x3F)) * hidden

    parts = table.bf16()
    for i in range(layers):
        names = {f"self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
        names |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        for name, (outputs, inputs) in names.items():
            parts += linear(Draw(random, f"model.layers.{i}.{name}", outputs, inputs))
        parts += [norm(f"model.layers.{i}.{name}_layernorm") for name in ("input", "post_attention")]
    parts += [norm("model.norm"), *Draw(random, "lm_head", vocab, hidden).bf16()]
    write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **SIZES,
        **({} if settings is None else {"quantization_config": settings}),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return _write_file(folder / "model.safetensors", parts)


def _write_file(path: Path, parts: list[Part]) -> Path:
    header: dict[str, object] = {}
    end = 0
    widths = {"I32": 4, "F32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1}
    for name, dtype, shape, _ in parts:
        size = widths[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the format's own writer aligns tensors
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for *_, contents in parts:
            file.write(contents())
        file.flush()
        os.fsync(file.fileno())  # pages that aren't on the disk yet can't be dropped
    return path


def drop(path: Path) -> None:
    """Have the system forget a file's pages."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def back(num_bytes: int) -> None:
    """Touch that much free memory: a virtual machine's host takes seconds a gigabyte for what nobody had before."""
    most = psutil.virtual_memory().available * 2 // 3
    with mmap.mmap(-1, min(num_bytes, most), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1


def read(path: Path) -> dict[str, float]:
    """Seconds that reading a file from its beginning to its end takes."""
    buffer = bytearray(8 << 20)
    back(path.stat().st_size)
    began_s = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return {"seconds": time.perf_counter() - began_s}


def load(path: Path, threads: int) -> dict[str, float]:
    """Seconds for the weights, and for all before and after them; peak memory, and what the plan says of weights."""
    from tightrope.backends.files.hf_config import read_config
    from tightrope.backends.files.safetensors import Checkpoint
    from tightrope.backends.hf import backend as hf
    from tightrope.backends.quant.find import find_quantization, weight_bytes
    from tightrope.backends.settings import CacheSettings, ModelSettings

    settings = ModelSettings(
        model=str(path.parent),
        max_model_len=512,
        max_num_seqs=1,
        threads=threads,
        cache=CacheSettings(tokens=512, dtype="f16"),
    )
    checkpoint = Checkpoint.open(path.parent)
    shape = read_config(path.parent)
    planned = weight_bytes(checkpoint, find_quantization(path.parent, shape.raw, checkpoint), is_tied=False)
    seen: list[tuple[float, float]] = []
    back(2 * path.stat().st_size)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here on
    before, base = resource.getrusage(resource.RUSAGE_SELF), _peak_bytes()
    began_s = time.perf_counter()

    def progress(share: float) -> None:
        seen.append((time.perf_counter() - began_s, share))

    backend = hf.HFBackend(path.parent, settings, progress)
    whole_s = time.perf_counter() - began_s
    after = resource.getrusage(resource.RUSAGE_SELF)
    weights_s = next(when for when, share in seen if share >= hf.WEIGHTS) - seen[0][0]
    backend.close()
    return {
        "seconds": weights_s,
        "rest_s": whole_s - weights_s,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "planned_gb": planned / 1e9,
        "peak_gb": (_peak_bytes() - base) / 1e9,  # beyond what the process had before
    }


def _peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def measure(path: Path, threads: int, rounds: int, *, is_cold: bool) -> dict[str, object]:
    """Readings and loads by turns."""
    found: dict[str, list[dict[str, float]]] = {"read": [], "load": []}
    for _ in range(rounds):
        for what, rows in found.items():
            if is_cold:
                drop(path)
            command = [sys.executable, "-m", "bench.loading", "--worker", what, str(path), "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
    size, (read_s, load_s) = path.stat().st_size, (min(row["seconds"] for row in rows) for rows in found.values())
    most_s = max(MOST_OF_READING * read_s, size / (LEAST_GB_S * 1e9 * threads))
    return {
        "bytes": size,
        "read_s": round(read_s, 3),
        "load_s": round(load_s, 3),
        "most_s": round(most_s, 3),
        "met": load_s <= most_s,
        **{name: spread([row[name] for row in found["load"]]) for name in found["load"][0]},
    }


def _known(setup: dict[str, object]) -> dict[str, object]:
    """What was measured of other forms with the same setup."""
    known = report.known("loading")
    return known if setup.items() <= known.items() else setup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--form", action="append", choices=FORMS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="don't drop the files from memory")
    parser.add_argument("--folder", type=Path, help="where files are kept and found again")
    args = parser.parse_args()
    if args.worker:
        what, path = args.worker[0], Path(args.worker[1])
        print(json.dumps(read(path) if what == "read" else load(path, args.threads)))
        return
    setup: dict[str, object] = {"layers": args.layers, "threads": args.threads, "is_cold": not args.warm}
    results = _known(setup)
    with tempfile.TemporaryDirectory() as made:
        for form in args.form or FORMS:
            path = (args.folder or Path(made)) / f"{form}-{args.layers}" / "model.safetensors"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path.parent, form, args.layers)
            results[form] = measure(path, args.threads, args.rounds, is_cold=not args.warm)
            print(form, results[form], flush=True)
            report.write("loading", results)  # each, so that a run that is cut short loses one at most
            if not args.folder:
                path.unlink()


if __name__ == "__main__":
    main()

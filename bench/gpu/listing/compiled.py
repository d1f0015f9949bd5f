"""A launch compiled for a card that needn't be there: registers, shared memory and its machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.gpu.listing.recorded import Launch

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")


@dataclass(frozen=True)
class Instruction:
    address: int  # bytes from the kernel's first
    name: str  # such as LDG.E.128
    operands: str


@dataclass(frozen=True)
class Compiled:
    """`registers` of a thread, bytes of its `stack`, bytes of `shared` memory of a program of `num_warps`."""

    registers: int
    stack: int
    shared: int
    num_warps: int
    instructions: tuple[Instruction, ...]

    @property
    def num_spills(self) -> int:
        """Instructions that move registers to a thread's stack, or back."""
        return sum(line.name.startswith(("LDL", "STL")) for line in self.instructions)


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """What Triton's compiler and ptxas make of a launch, its arguments specialised as the launcher would."""
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        is_free = parameter.do_not_specialize
        if value is None or parameter.is_constexpr or (isinstance(value, int) and value == 1 and not is_free):
            signature[name] = "constexpr"
            constants[index,] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not is_free and not parameter.do_not_specialize_on_alignment:
                aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    listing = _listing(compiled.asm["cubin"])
    usage = USAGE.search(listing)
    assert usage is not None, listing[:200]
    instructions = [Instruction(int(m[1], 16), m[2], m[3]) for m in map(LINE.match, listing.splitlines()) if m]
    return Compiled(
        int(usage[1]), int(usage[2]), compiled.metadata.shared, compiled.metadata.num_warps, tuple(instructions)
    )


def _listing(cubin: bytes) -> str:
    """Resources and machine code, as NVIDIA's tool, which comes with Triton, prints them."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        texts = [
            subprocess.run([tool, option, file], capture_output=True, text=True, check=True)
            for option in ("-res-usage", "-sass")
        ]
    return "".join(text.stdout + text.stderr for text in texts)

"""Compiles every variant of the Triton kernels for Hopper, where there need be no GPU; writes a JSON list.

`python -m tests.head.kernels.compiling`, in a process of its own: under Triton's interpreter kernels are not compiled.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_psft.head.kernels import fused

HOPPER = GPUTarget("cuda", 90, 32)
KERNELS = {
    "sums": (fused._sums_kernel, fused.SUMS_SHAPE),
    "gradient": (fused._gradient_kernel, fused.GRADIENT_SHAPE),
}
# What Triton knows of multiples of 16 makes other code: a padded vocabulary, one with added tokens, and a view of one.
MULTIPLES_OF_16 = (("row_stride", "out_stride", "num_columns"), ("row_stride", "out_stride"), ())
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def _type_of(argument: str, out: str) -> str:
    if argument in ("row_stride", "out_stride", "num_columns"):
        return "i32"
    types = {"out": f"*{out}", "order": "*i64", "label_index": "*i64", "block": "constexpr"}
    return types.get(argument, "*fp32")


def compile_kernel(name: str, out: str, multiples_of_16: tuple[str, ...]) -> dict[str, int]:
    """Registers and bytes of stack and local memory of a thread, and bytes of shared memory of a block."""
    function, (block, warps) = KERNELS[name]
    types = {argument: _type_of(argument, out) for argument in function.arg_names}
    aligned = [
        (index,)
        for index, (argument, type) in enumerate(types.items())
        if type.startswith("*") or argument in multiples_of_16
    ]
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={(len(types) - 1,): block},
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = _USAGE.search(said)
    assert usage is not None, said
    registers, stack, _, local = map(int, usage.groups())
    return {"registers": registers, "stack": stack, "local": local, "shared": compiled.metadata.shared}


def compile_all() -> list[dict]:
    """What each variant is, and what it takes."""
    variants = []
    for name, out, multiples in itertools.product(KERNELS, ("bf16", "fp32"), MULTIPLES_OF_16):
        if name == "gradient" or out == "fp32":
            usage = compile_kernel(name, out, multiples)
            variants.append({"kernel": name, "out": out, "multiples_of_16": multiples, **usage})
    return variants


if __name__ == "__main__":
    json.dump(compile_all(), sys.stdout, indent=1)

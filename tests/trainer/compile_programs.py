"""Compiles every program for a GPU of a compute capability, which need not be there; prints what each needs.

TRITON_INTERPRET=0 python tests/trainer/compile_programs.py 90
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))
from trainer.kernels import programs

SUMS = {"BLOCK": 512, "CHOSEN": 16, "EXACT": tl.float32}
NUMBERS = {"n": "i32", "n_latents": "i32", "n_chosen": "i32", "width": "i32"}
POINTERS = {"among": "*i64", "indices": "*i64", "order": "*i64", "ends": "*i64"}


def compiled(program, dtype: str, constants: dict, capability: int, **options):
    names = program.arg_names
    types = {name: NUMBERS.get(name) or POINTERS.get(name) or f"*{dtype}" for name in names}
    if program is programs.search:
        types["out"] = "*i64"
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(program, types, {(names.index(name),): value for name, value in constants.items()})
    options |= {"enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def local_bytes(cubin: bytes) -> int:
    """Local memory a thread needs: what did not fit into registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", said.stdout + said.stderr))


def main(capability: int) -> None:
    room = {"LANES": 1024, "PADDED": 32, "ROOM": 64}
    jobs = [
        (programs.search, "bf16", {**room, "IS_AMONG": False}, 8),
        (programs.search, "fp32", {"LANES": 1024, "PADDED": 256, "ROOM": 512, "IS_AMONG": True}, 8),
    ]
    jobs += [
        (program, dtype, SUMS, 4)
        for program in (programs.bags, programs.dots, programs.by_latent)
        for dtype in ("fp32", "bf16")
    ]
    for program, dtype, constants, warps in jobs:
        code = compiled(program, dtype, constants, capability, num_warps=warps)
        print(f"{program.__name__} {dtype}: {local_bytes(code.asm['cubin'])} bytes of local memory")


if __name__ == "__main__":
    main(int(sys.argv[1]))

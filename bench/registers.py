"""Registers and stack of a thread of our Triton kernels, compiled ahead of time: needs Triton, and no GPU.

    python bench/registers.py [--capabilities 80 90 100]

On the stack, which lies in memory, a kernel keeps the numbers that its registers do not hold: what spills. The numbers
are those of the binary that Triton made, as the cuobjdump that comes with it reads them: Triton chooses among several
assemblers and gives them options of its own. Shared memory is that of a block of threads, in bytes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nearfar.ssl.backbones import scan_triton
from nearfar.ssl.data.transforms import triton_colors

HALF = {"x", "B", "C", "y", "grad", "to_x"}  # what Vim's scan takes and gives as bfloat16 under autocast
COLORS = {"images": "*u8", "columns": "i32", "height": "i32", "width": "i32", "pixels": "i32", "threshold": "fp32"}


def scan_types(kernel: Any) -> dict[str, str]:
    names = {"length": "i32", "width": "i32", "state": "i32"} | dict.fromkeys(HALF, "*bf16")
    return {name: names.get(name, "*fp32") for name in kernel.arg_names}


def kernels() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, types of its arguments, and the ones that are constants."""
    listed: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    sizes = {"forward_kernel": scan_triton.FORWARD_BLOCK, "backward_kernel": scan_triton.BACKWARD_BLOCK}
    for name, block in sizes.items():
        kernel = getattr(scan_triton, name)
        for reverse in (False, True):
            fixed = {"REVERSE": reverse, "CHUNK": scan_triton.CHUNK, "BLOCK": block, "STATE": 16}
            listed.append((f"scan, {name[:-7]}{', reverse' * reverse}", kernel, scan_types(kernel), fixed))
    adjust, blur = triton_colors._adjust_kernel, triton_colors._blur_kernel
    for summing in (True, False):
        types = {name: COLORS.get(name, "*fp32") for name in adjust.arg_names}
        fixed = {"SUMMING": summing, "BLOCK": triton_colors._BLOCK}
        listed.append((f"colors, {'gray sums' if summing else 'adjustments'}", adjust, types, fixed))
    for across in (True, False):
        types = {name: COLORS.get(name, "*fp32") for name in blur.arg_names}
        fixed = {"RADIUS": 6, "ACROSS": across, "BLOCK": triton_colors._BLOCK}
        listed.append((f"colors, blur {'along rows' if across else 'along columns'}", blur, types, fixed))
    return listed


def usage(kernel: Any, types: dict[str, str], fixed: dict[str, Any], capability: int) -> tuple[int, int, int]:
    """Registers and bytes of stack of a thread, and shared bytes of a block."""
    types = types | dict.fromkeys(fixed, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": scan_triton.WARPS})
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [reader, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1]), int(found[2]), int(built.metadata.shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100])
    capabilities = parser.parse_args().capabilities
    print(
        f"Triton {triton.__version__}: registers of a thread / bytes of stack of a thread / shared bytes of a block\n"
    )
    print("| kernel | " + " | ".join(f"sm_{each}" for each in capabilities) + " |")
    print("|---|" + "--:|" * len(capabilities))
    for name, kernel, types, fixed in kernels():
        cells = [" / ".join(map(str, usage(kernel, types, fixed, each))) for each in capabilities]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

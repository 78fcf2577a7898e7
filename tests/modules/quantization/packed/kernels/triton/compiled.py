"""Compile the kernels for GPUs that are not here; print, as JSON, what is in the code of each.

    python compiled.py 80 86 89 90 100

The address of each matrix is taken to be a multiple of 16, as that of memory from PyTorch is.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fairseq.modules.quantization.packed.kernels.triton import norm, product, quantize
from fairseq.modules.quantization.packed.kernels.triton.tiles import tile_for

MATRIX = re.compile(r"wgmma\.mma_async\S*s32\.s8\.s8|mma\.sync\S*\.s32\.s8\.s8\.s32|tcgen05\.mma\S*kind::i8")
POINTERS = {
    "token_scale": "fp32", "sums": "i32", "scale": "fp32", "zero_point": "u8", "bias": "bf16", "correction": "fp32",
    "residual": "bf16", "next_scale": "fp32", "next_zero": "i32", "out_scale": "fp32", "out_sums": "i32", "x": "bf16",
    "factor": "fp32", "fixed_scale": "fp32", "fixed_zero": "i32", "q": "i8", "scales": "fp32", "weight": "fp32",
}  # fmt: skip


def compiled(kernel, capability, constants, types, **options):
    """The code of a kernel for a compute capability: PTX instructions, registers, bytes of stack and shared memory."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name) or f"*{POINTERS[name]}" for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if signature[name].startswith("*") or name in ("N", "K", "stride")}  # fmt: skip
    source = ASTSource(
        fn=kernel, signature=signature, attrs=aligned,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )  # fmt: skip
    code = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False, **options}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    return {
        "registers": int(found["REG"]), "stack": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": code.metadata.shared, "matrix": sorted(set(MATRIX.findall(code.asm["ptx"]))),
        "wide": "ld.global.v4" in code.asm["ptx"] or "cp.async" in code.asm["ptx"],
    }  # fmt: skip


def product_for(capability, rows, columns=3072, following=False):
    """fc1 of a ViT-Base: with GELU, bias and a zero point, and for ``following`` integers for fc2."""
    tile = tile_for(capability, rows, columns)
    types = {
        "a": f"tensordesc<i8[{tile.rows}, {tile.inner}]>" if tile.descriptors else "*i8",
        "w": f"tensordesc<i8[{tile.columns}, {tile.inner}]>" if tile.descriptors else "*i8",
        "out": "*i8" if following else "*bf16", **dict.fromkeys("MNK", "i32"),
    }  # fmt: skip
    constants = {
        "PARTS": 1, "ONE": False, "CENTRED": False, "OFFSET": 128, "BIAS": True,
        "CORRECTION": False, "ACTIVATION": "gelu", "RESIDUAL": False, "NEXT": following, "RAW": False,
        "EVEN": True, "DESCRIPTORS": tile.descriptors, "BM": tile.rows, "BN": tile.columns,
        "BK": tile.inner,
    }  # fmt: skip
    return compiled(product.product_kernel, capability, constants, types, num_warps=tile.warps, num_stages=tile.stages)


def rows_for(capability, kernel, **constants):
    types = {"K": "i32", "stride": "i32", "epsilon": "fp32"}
    return compiled(
        kernel, capability, {"STATIC": False, "BLOCK": 1024, **constants}, types, num_warps=quantize.warps(1024, 12608)
    )


def main():
    found = {}
    for capability in map(int, sys.argv[1:]):
        found[f"{capability} quantize"] = rows_for(capability, quantize.quantize_kernel, FACTOR=False)
        found[f"{capability} norm"] = rows_for(capability, norm.norm_kernel)
        found[f"{capability} product"] = product_for(capability, 12608)
        found[f"{capability} product, to int8"] = product_for(capability, 12608, following=True)
        found[f"{capability} product, 197 rows"] = product_for(capability, 197)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

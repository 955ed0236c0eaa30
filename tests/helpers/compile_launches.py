"""Compiles the launches of every op ahead of time and reports what the compiler made of them, as JSON.

Run it in its own process, without ``TRITON_INTERPRET``: ``python -m tests.helpers.compile_launches sm_90,… [REGEX]``.
REGEX selects cases by name. No GPU is needed: the launches are built from meta tensors, and Triton ships the
assemblers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atedm_kernels import tiles
from atedm_kernels._launch import Launch
from atedm_kernels.ops import triton_power_iteration as power_iteration
from atedm_kernels.ops.attention_column_sums import triton_kernel as column_sums
from atedm_kernels.ops.gather_pair import triton_kernel as gather_pair
from atedm_kernels.ops.gather_tokens import triton_kernel as gather
from atedm_kernels.ops.recover_feature_map import triton_kernel as feature_map
from atedm_kernels.ops.select_tokens import triton_kernel as select
from atedm_kernels.ops.similarity_source import triton_kernel as similarity
from atedm_kernels.ops.sum_rows import triton_kernel as sum_rows
from atedm_kernels.ops.token_drift import triton_kernel as token_drift
from atedm_kernels.ops.update_feature_map import triton_kernel as update
from atedm_kernels.ops.weighted_page_rank import triton_kernel as page_rank
from atedm_kernels.ops.weighted_page_rank_cross import triton_kernel as page_rank_cross
from atedm_kernels.tiles import tile_for

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint32: "*u32",
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# A map that is cut out of a wider one, so that its rows are not contiguous.
CUT_OUT = "cut-out"

MATRIX_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def page_rank_launches(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor) -> list[Launch]:
    state = power_iteration.empty_state(lse)
    starts = [power_iteration.start_launch(lse, initial, state) for initial in (None, lse)]
    return [*starts, *page_rank.iteration_launches(q, k, lse, state, 0.125, 1e-3)]


def attention_launches(
    op: str, dtype: str, head_dim: int, tokens: int, heads: int, *, is_first: bool = False
) -> list[Launch]:
    """Launch ``op`` on queries and keys as a diffusers block has them: ``[B, N, H, D]``, transposed.

    ``is_first``: with every variant of the launches.
    """
    q, k = (meta(2, tokens, heads, head_dim, dtype=DTYPES[dtype]).transpose(1, 2) for _ in range(2))
    lse = meta(2, heads, tokens)
    if op == "column_sums":
        # Uniform weights only leave out a factor, so one shape stands for all.
        weights = (None, lse) if is_first else (lse,)
        partial = column_sums.empty_partial_sums(q, k)
        return [column_sums.column_sums_launch(q, k, lse, partial, 0.125, weights=each) for each in weights]
    if op == "page_rank":
        return [one for one in page_rank_launches(q, k, lse) if one.kernel is column_sums._column_sums_kernel]
    if op == "page_rank_cross":
        k = meta(2, 77, heads, head_dim, dtype=DTYPES[dtype]).transpose(1, 2)
        launches = page_rank_cross.iteration_launches(q, k, lse, power_iteration.empty_state(lse), 0.125, 1e-3)
        return [one for one in launches if one.kernel is page_rank_cross._rows_kernel]
    launches = source_launches(q, k, lse)
    if is_first:
        # As with large batches, where there are enough rows to fill a GPU without splitting the kept tokens.
        tile = replace(tile_for(similarity.OP, q), programs=1)
        with tiles.assume(similarity_source=tile):
            launches += source_launches(q, k, lse)
    return [one for one in launches if one.kernel is similarity._similarity_kernel]


def source_launches(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor) -> list[Launch]:
    batch, _, tokens = lse.shape
    index = meta(batch, tokens * 3 // 8, dtype=torch.int64)
    return similarity.similarity_launches(q, k, lse, index, 0.125, meta(batch, tokens, dtype=torch.int64))


def small_launches() -> list[Launch]:
    """Launch the kernels that do not read the map: its dtype and head dim do not change their code."""
    q, lse = meta(2, 10, 4096, 64, dtype=torch.bfloat16), meta(2, 10, 4096)
    over_map = (column_sums._column_sums_kernel, similarity._similarity_kernel)
    return [one for one in page_rank_launches(q, q, lse) + source_launches(q, q, lse) if one.kernel not in over_map]


def select_launches(reduction: str, tokens: int, heads: int, keep: int) -> list[Launch]:
    scores, out = meta(2, heads, tokens), meta(2, keep, dtype=torch.int64)
    return [select.select_launch(scores, select.scratch(scores), out, reduction)]


def gather_launches(dtype: str, channels: int) -> list[Launch]:
    x, out = (meta(2, n, channels, dtype=DTYPES[dtype]) for n in (4096, 1536))
    index = meta(2, 1536, dtype=torch.int64)
    return [gather.gather_launch(x, index, out), gather_pair.gather_pair_launch(x, x, index, out, out)]


def sum_rows_launches(dtype: str, channels: int) -> list[Launch]:
    x, out = (meta(2, n, channels, dtype=DTYPES[dtype]) for n in (4096, 1536))
    order, begins = (meta(2, n, dtype=torch.int64) for n in (4096, 1537))
    return [sum_rows.sum_rows_launch(x, order, begins, out)]


def feature_map_launches(x_dtype: str, dtype: str, layout: str) -> list[Launch]:
    residual = meta(2, 640, 64, 80, dtype=DTYPES[dtype])[..., :64]
    if layout != CUT_OUT:
        residual = residual.contiguous(memory_format=LAYOUTS[layout])
    out = torch.empty_like(
        residual.contiguous() if layout == CUT_OUT else residual,
        dtype=torch.promote_types(DTYPES[x_dtype], DTYPES[dtype]),
    )
    x, cache = (meta(2, n, 640, dtype=DTYPES[x_dtype]) for n in (1536, 4096))
    projection, seen, drift = (meta(*size, dtype=residual.dtype) for size in ((4, 640), (2, 4, 4096), (2, 4096)))
    return [
        token_drift.token_drift_launch(residual, projection, seen, seen, drift.float()),
        feature_map.recover_launch(x, meta(2, 4096, dtype=torch.int64), residual, out),
        update.update_launch(x, meta(2, 1536, dtype=torch.int64), cache, residual, out),
    ]


def smallest_launches() -> list[Launch]:
    """Launch every kernel with all sizes 1: Triton turns arguments of 1 into constants, which changes the code."""
    q = meta(1, 1, 1, 8, dtype=torch.float16)
    lse, x = meta(1, 1, 1), meta(1, 1, 1, dtype=torch.float16)
    index = meta(1, 1, dtype=torch.int64)
    state = power_iteration.empty_state(lse)
    residual = meta(1, 1, 1, 1, dtype=torch.float16)
    return [
        *page_rank_launches(q, q, lse),
        *page_rank_cross.iteration_launches(q, q, lse, state, 0.5, 1e-3),
        select.select_launch(lse, select.scratch(lse), index, "rms"),
        gather.gather_launch(x, index, x),
        gather_pair.gather_pair_launch(x, x, index, x, x),
        sum_rows.sum_rows_launch(x, index, meta(1, 2, dtype=torch.int64), x),
        token_drift.token_drift_launch(residual, x[0], x, x, lse),
        *similarity.similarity_launches(q, q, lse, index, 0.5, index),
        feature_map.recover_launch(x, index, residual, residual),
        update.update_launch(x, index, x, residual, residual),
    ]


def cases(target: str) -> dict[str, Callable[[], list[Launch]]]:
    """Return the builder of each case, by name. The shapes are those of SDXL, with the head dims of earlier models too.

    fp16 differs from bf16 only by conversions, so only "smallest" is in fp16. What changes the code before it becomes
    specific to a target is compiled for one target per vendor: sizes of 1, which are constants, other dtypes and
    layouts of what is only moved, head dims and lengths between others.
    """
    takes_all = target in ("sm_90", "gfx942")
    found: dict[str, Callable[[], list[Launch]]] = {"small": small_launches}
    if takes_all:
        found["smallest"] = smallest_launches
    sdxl = [("bf16", 64, 4096, 10), ("bf16", 64, 1024, 20), ("fp32", 64, 4096, 10)]
    others = [
        ("bf16", head_dim, 1000, 8) for head_dim in ((40, 80, 128, 160, 256) if takes_all else (40, 80, 160, 256))
    ]
    others += [("fp32", head_dim, 1000, 8) for head_dim in (40, 256)]
    # The ranking's column sums differ from the op's only in where a weight comes from, so the op has only one shape.
    shapes_of = {"column_sums": sdxl[:1], "page_rank": [*sdxl, *others], "similarity": [*sdxl, *others]}
    shapes_of["page_rank_cross"] = [*sdxl, *(shape for shape in others if shape[:2] in (("bf16", 40), ("bf16", 256)))]
    for op, shapes in shapes_of.items():
        for dtype, head_dim, tokens, heads in shapes:
            name = f"{op}-{dtype}-d{head_dim}-n{tokens}"
            shape = dtype, head_dim, tokens, heads
            found[name] = lambda op=op, s=shape: attention_launches(op, *s, is_first=s == sdxl[0])
    for tokens, heads, keep in ((4096, 10, 1536), (8192, 10, 3000), (16384, 10, 6000), (77, 1, 1)):
        if takes_all or tokens != 8192:
            found[f"select-rms-n{tokens}"] = lambda a=(tokens, heads, keep): select_launches("rms", *a)
    found["select-mean-n1024"] = lambda: select_launches("mean", 1024, 20, 384)
    for dtype in ("bf16", "fp32") if takes_all else ("bf16",):
        found[f"gather-{dtype}-c640"] = lambda dtype=dtype: gather_launches(dtype, 640)
        found[f"sum_rows-{dtype}-c640"] = lambda dtype=dtype: sum_rows_launches(dtype, 640)
    feature_maps = [("bf16", "bf16", "contiguous")]
    if takes_all:
        feature_maps += [("bf16", "bf16", "channels-last"), ("bf16", "bf16", CUT_OUT)]
        feature_maps += [("fp32", "fp32", "contiguous"), ("bf16", "fp32", "contiguous")]
    for dtypes_and_layout in feature_maps:
        found[f"feature_map-{'-'.join(dtypes_and_layout)}"] = lambda a=dtypes_and_layout: feature_map_launches(*a)
    return found


def source(launch: Launch) -> ASTSource:
    """Return the launch as Triton specialises it at run time: on 1, on multiples of 16, on None."""
    signature, constants, attributes = {}, {}, {}
    values = {**launch.arguments, **launch.constants}
    if set(values) != set(launch.kernel.arg_names):
        raise ValueError(f"arguments differ from the kernel's: {set(values) ^ set(launch.kernel.arg_names)}")
    for position, name in enumerate(launch.kernel.arg_names):
        value = values[name]
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def nvidia_resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
    }


def amd_resources(assembly: str) -> dict[str, int]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    # Scalar registers spill into lanes of vector registers, not into memory.
    return {
        "registers": field("vgpr_count"),
        "spill_bytes": 4 * field("vgpr_spill_count") + field("private_segment_fixed_size"),
    }


def access_bytes(assembly: str, kind: str) -> list[int]:
    """Return the widths of the accesses to global memory in PTX or AMD assembly. ``kind``: "load" or "store"."""
    nvidia = re.findall(rf"\b{'ld' if kind == 'load' else 'st'}\.global\S*?\.(?:v(\d)\.)?b(\d+)\b", assembly)
    amd = re.findall(rf"(?:global|buffer)_{kind}_dword(?:x(\d))?\b", assembly)
    return sorted({int(n or 1) * int(bits) // 8 for n, bits in nvidia} | {4 * int(n or 1) for n in amd})


def compile_launch(launch: Launch, target: GPUTarget) -> dict[str, object]:
    kernel = triton.compile(source(launch), target=target, options=launch.options(target.backend))
    nvidia = target.backend == "cuda"
    assembly = kernel.asm["ptx" if nvidia else "amdgcn"]
    return {
        "kernel": launch.kernel.__name__,
        "warps": launch.num_warps,
        "shared": kernel.metadata.shared,
        "loads": access_bytes(assembly, "load"),
        "stores": access_bytes(assembly, "store"),
        "matrix": next((name for name in MATRIX_INSTRUCTIONS if name in assembly), None),
        **(nvidia_resources(kernel.asm["cubin"]) if nvidia else amd_resources(assembly)),
    }


def rows(target: str, wanted: str) -> Iterator[dict[str, object]]:
    for name, build in cases(target).items():
        if re.search(wanted, name):
            with tiles.assume(architecture=target):
                launches = build()
            for launch in launches:
                yield {"target": target, "case": name, **compile_launch(launch, TARGETS[target])}


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET is set: the interpreter replaces the compiler")
    targets, wanted = sys.argv[1].split(","), sys.argv[2] if len(sys.argv) > 2 else ""
    json.dump([row for target in targets for row in rows(target, wanted)], sys.stdout)

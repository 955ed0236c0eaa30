"""The native CPU library (``csrc/``): how it is loaded and called, and which instruction set (ISA) it uses.

The library has a plain C interface and uses neither Python nor torch. ctypes passes addresses and strides, and releases
the GIL during a call. The first op that needs the library loads it; :func:`why_not` says why it is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import platform
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
PATH = Path(__file__).with_name("libatedm" + SUFFIX)

# ATEDM_ABI in csrc/atedm.h. It is raised whenever a signature changes, so that a library of an older build is refused.
ABI = 4

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
REDUCTION_CODES = {"rms": 0, "mean": 1}

_OUT_OF_MEMORY = 1

_PROCESS = os.getpid()

_int32, _int64, _double, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class AttentionMapStruct(ctypes.Structure):
    """``atedm_map``."""

    _fields_ = (
        ("q", _pointer),
        ("k", _pointer),
        ("lse", _pointer),
        ("batch", _int64),
        ("heads", _int64),
        ("queries", _int64),
        ("keys", _int64),
        ("head_dim", _int64),
        ("q_stride", _int64 * 4),
        ("k_stride", _int64 * 4),
        ("lse_stride", _int64 * 3),
        ("scale", _double),
        ("dtype", _int32),
    )


class FeatureMapStruct(ctypes.Structure):
    """``atedm_feature_map``."""

    _fields_ = (
        ("x", _pointer),
        ("residual", _pointer),
        ("index", _pointer),
        ("out", _pointer),
        ("batch", _int64),
        ("slots", _int64),
        ("channels", _int64),
        ("height", _int64),
        ("width", _int64),
        ("x_stride", _int64 * 3),
        ("index_stride", _int64 * 2),
        ("residual_stride", _int64 * 4),
        ("x_dtype", _int32),
        ("residual_dtype", _int32),
        ("out_dtype", _int32),
        ("channels_last", _int32),
    )


_map = ctypes.POINTER(AttentionMapStruct)
_feature_map = ctypes.POINTER(FeatureMapStruct)
_SIGNATURES = {
    "atedm_attention_column_sums": (_map, _pointer, _pointer, _pointer, _int32),
    "atedm_weighted_page_rank": (_map, _int32, _double, _pointer, _pointer, _pointer, _pointer, _int32),
    "atedm_weighted_page_rank_cross": (_map, _int32, _double, _pointer, _pointer, _pointer, _pointer, _int32),
    "atedm_similarity_source": (_map, _pointer, _pointer, _int64, _pointer, _int32),
    "atedm_select_tokens": (_pointer, _pointer, _int64, _int64, _int64, _int64, _int32, _pointer, _int32),
    "atedm_gather_rows": (
        *(_pointer, _pointer, _int64, _int64, _int64, _int32),
        *(_pointer, _pointer, _int64, _pointer, _int32),
    ),
    "atedm_recover_feature_map": (_feature_map, _int32),
    "atedm_update_feature_map": (_feature_map, _pointer, _pointer, _int32),
    "atedm_set_isa": (_int32,),
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library and None, or None and the reason why it is missing."""
    if not PATH.exists():
        return (
            None,
            f"{PATH.name} was not built: the installation found no working C++ compiler (see the installer's output)",
        )
    try:
        if not _is_whole(PATH):
            return None, f"{PATH.name} is truncated: reinstall it"
        library = ctypes.CDLL(str(PATH))
        abi = library.atedm_abi()
    except (OSError, AttributeError) as error:
        return None, f"{PATH.name} cannot be loaded: {error}"
    if abi != ABI:
        return None, f"{PATH.name} has interface {abi}, but this package needs {ABI}: reinstall it"
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _int32
    for name in ("atedm_isa_name", "atedm_isa_why_not"):
        function = getattr(library, name)
        function.argtypes, function.restype = (_int32,), ctypes.c_char_p
    library.atedm_set_map_limits.argtypes = (_int64, _int64)
    library.atedm_set_openmp.argtypes = (_pointer,)
    library.atedm_set_openmp(_torch_openmp())
    return library, None


def _is_whole(path: Path) -> bool:
    """Whether a library is as long as its ELF header says. Reading past the end of a mapped file ends the process.

    The header gives the offset of the section table, the last part of the file, and the number and size of its entries.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if header[:4] != b"\x7fELF" or header[4:5] == b"\x01":
        return True  # another format, or 32 bits: the loader checks it
    if len(header) < 64:
        return False
    begin, size, count = struct.unpack_from("<Q", header, 0x28) + struct.unpack_from("<HH", header, 0x3A)
    return path.stat().st_size >= begin + size * count


def _torch_openmp() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch's own CPU kernels use, or None.

    The runtime's threads spin for a while after torch's last kernel. A second set of threads would compete with them
    for the cores.
    """
    # A forked child inherits a runtime that waits for threads that the child does not have.
    is_child = os.getpid() != _PROCESS or multiprocessing.parent_process() is not None
    if sys.platform != "linux" or is_child:
        return None
    try:
        mapped = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in mapped.splitlines() if len(line.split(maxsplit=5)) == 6}
    runtimes = [Path(path) for path in sorted(paths) if "libgomp" in Path(path).name or "libiomp5" in Path(path).name]
    torch_folder = Path(torch.__file__).parent
    # Other packages bring their own runtimes. If torch brings none and only one is loaded, torch uses that one.
    own = [path for path in runtimes if torch_folder in path.parents or "torch.libs" in path.parts]
    for path in own or (runtimes if len(runtimes) == 1 else []):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, _pointer).value
    return None


def _names(library: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while (name := library.atedm_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


def isas() -> dict[str, str | None]:
    """ISAs, slowest first, each with why this machine cannot run it (None if it can). Empty without the library."""
    library, _ = _load()
    if library is None:
        return {}
    reasons = [library.atedm_isa_why_not(i) for i in range(len(_names(library)))]
    return {
        name: None if reason is None else reason.decode() for name, reason in zip(_names(library), reasons, strict=True)
    }


def _set_isa(library: ctypes.CDLL, name: str, source: str) -> None:
    available = isas()
    if name not in available:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(available)}")
    if available[name] is not None:
        raise ValueError(f"{source} is {name!r}, which cannot run here: {available[name]}")
    library.atedm_set_isa(list(available).index(name))


@functools.cache
def _obey_environment() -> None:
    library, _ = _load()
    name = os.environ.get("ATEDM_CPU")
    if library is not None and name:
        _set_isa(library, name, "ATEDM_CPU")


def why_not() -> str | None:
    """Why there is no native library, or None if there is one.

    Raises:
        ValueError: ``ATEDM_CPU`` names an unknown ISA, or one that cannot run here.
    """
    reason = _load()[1]
    if reason is None:
        _obey_environment()
    return reason


def isa() -> str | None:
    """The active ISA, or None without the library."""
    if why_not() is not None:
        return None
    library, _ = _load()
    return _names(library)[library.atedm_isa()]


@contextlib.contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Run every thread's native kernels with another ISA; for tests.

    Raises:
        ValueError: an unknown ISA, one that cannot run here, or no library.
    """
    before = isa()
    library, reason = _load()
    if library is None:
        raise ValueError(f"isa is {name!r}, but there is no native library: {reason}")
    _set_isa(library, name, "isa")
    try:
        yield
    finally:
        _set_isa(library, before, "isa")


@contextlib.contextmanager
def map_limits(float_bytes: int, sixteen_bit_bytes: int) -> Iterator[None]:
    """Change the size up to which a ranking keeps a head's map in float32, and in 16 bits; for tests."""
    library, _ = _load()
    library.atedm_set_map_limits(float_bytes, sixteen_bit_bytes)
    try:
        yield
    finally:
        library.atedm_set_map_limits(-1, -1)


def describe() -> str:
    """Describe the library in one line, for reports."""
    reason = why_not()
    if reason is not None:
        return f"not in use: {reason}"
    best = [name for name, missing in isas().items() if missing is None][-1]
    forced = "" if isa() == best else f" (forced by ATEDM_CPU; the best here is {best})"
    threads = "torch's OpenMP threads" if _torch_openmp() else "its own threads"
    return f"{PATH.name}, ISA {isa()}{forced}, {platform.machine()}, up to {torch.get_num_threads()} of {threads}"


def strides(tensor: Tensor) -> ctypes.Array:
    return (_int64 * tensor.ndim)(*tensor.stride())


def attention_map(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> AttentionMapStruct:
    batch, heads, queries, head_dim = q.shape
    return AttentionMapStruct(
        q.data_ptr(),
        k.data_ptr(),
        lse.data_ptr(),
        batch,
        heads,
        queries,
        k.shape[2],
        head_dim,
        strides(q),
        strides(k),
        strides(lse),
        scale,
        DTYPE_CODES[q.dtype],
    )


def feature_map(x: Tensor, index: Tensor, residual: Tensor, out: Tensor) -> FeatureMapStruct:
    """``out`` must be contiguous or channels-last."""
    batch, channels, height, width = residual.shape
    return FeatureMapStruct(
        x.data_ptr(),
        residual.data_ptr(),
        index.data_ptr(),
        out.data_ptr(),
        batch,
        x.shape[1],
        channels,
        height,
        width,
        strides(x),
        strides(index),
        strides(residual),
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[residual.dtype],
        DTYPE_CODES[out.dtype],
        not out.is_contiguous(),
    )


def call(name: str, *arguments: object) -> None:
    """Call a kernel of the library with as many threads as torch uses.

    Raises:
        MemoryError: the kernel could not allocate its working memory.
    """
    library, _ = _load()
    status = getattr(library, name)(*arguments, torch.get_num_threads())
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"{name} could not allocate working memory")
    if status != 0:
        raise RuntimeError(f"{name} refused arguments that had passed the op's checks (status {status})")

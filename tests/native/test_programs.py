"""The library in C++ programs: under AddressSanitizer and UndefinedBehaviorSanitizer, and with AMX emulated."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from atedm_kernels import native
from csrc import build

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")


def test_no_sanitizer_complains(tmp_path):
    try:
        probe = tmp_path / "probe.cpp"
        probe.write_text("int main() { return 0; }")
        build._run([*build.compiler(), *SANITIZERS, str(probe), "-o", str(tmp_path / "probe")])
        build._run([str(tmp_path / "probe")])
    except (build.BuildError, OSError) as error:
        pytest.skip(f"no compiler with sanitizers: {str(error)[-200:]}")
    # What cannot run here need not be compiled.
    isas = [name for name, missing in native.isas().items() if missing is None]
    files = build.objects(tmp_path, SANITIZERS, isas)
    program, source = tmp_path / "exercise", Path(__file__).with_name("exercise.cpp")
    command = [*build.compiler(), *build.FLAGS, *SANITIZERS, f"-I{build.SOURCES}", source, *files, "-o", program]
    build._run([str(part) for part in command])
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert int(done.stdout.split()[0]) > 1000


# A CPU that has everything, on a system that grants the tiles or does not.
ASKS = """
#include <cstdint>
#include <cstdio>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
static long asked = 0, granted = 0;
static int everything(unsigned *a, unsigned *b, unsigned *c, unsigned *d) { *a = *b = *c = *d = ~0u; return 1; }
static long grant(long number, long code, long state) {
  asked += number == SYS_arch_prctl && code == 0x1023 && state == 18;
  return granted ? 0 : -1;
}
#define __get_cpuid(leaf, a, b, c, d) everything(a, b, c, d)
#define __get_cpuid_count(leaf, part, a, b, c, d) everything(a, b, c, d)
#define syscall(number, code, state) grant(number, code, state)
#define ATEDM_HAS_AMX
%s
namespace atedm {
namespace portable { const Kernels kKernels{}; }
namespace amx { const Kernels kKernels{}; }
}
int main() {
  for (granted = 0; granted < 2; ++granted) {
    asked = 0;
    const char *reason = atedm_isa_why_not(ATEDM_AMX);
    std::printf("%%ld %%s\\n", asked, reason == nullptr ? "runs" : reason);
  }
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="AMX is x86's, and Linux asks")
def test_amx_is_used_only_where_the_system_grants_it(tmp_path):
    code = (build.SOURCES / "isa.cpp").read_text()
    saved = '__asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));'
    assert code.count(saved) == 1
    source, program = tmp_path / "asks.cpp", tmp_path / "asks"
    source.write_text(ASKS % code.replace(saved, "low = high = ~0u;"))
    build._run([*build.compiler(), *build.FLAGS, f"-I{build.SOURCES}", str(source), "-o", str(program)])
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["1 the operating system grants no AMX tiles", "1 runs"], (
        done.stdout + done.stderr
    )


def test_amx_kernels_on_emulated_tiles(tmp_path):
    """The AMX kernels with the tile unit emulated, for machines without AMX."""
    if native.isas()["avx512_bf16"] is not None:
        pytest.skip(f"the rest of the ISA needs avx512_bf16: {native.isas()['avx512_bf16']}")
    here = Path(__file__).parent
    base = [*build.compiler(), *build.FLAGS, "-O1", f"-I{build.SOURCES}", f"-I{here}"]
    emulated = [*build.ISAS["avx512_bf16"], "-DATEDM_ISA=4", "-DATEDM_NAMESPACE=amx"]
    emulated.append('-DATEDM_EMULATED_TILES="amx_emulation.h"')
    objects = build.objects(tmp_path, ["-O1"], ["portable"])
    program = tmp_path / "amx"
    try:
        build._run([*base, *emulated, "-c", f"{build.SOURCES}/kernels.cpp", "-o", f"{tmp_path}/emulated.o"])
        sources = [f"{here}/amx_emulated.cpp", f"{tmp_path}/emulated.o", *map(str, objects)]
        build._run([*base, *sources, "-o", str(program)])
    except build.BuildError as error:
        pytest.fail(str(error)[-3000:])
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "same\n", done.stdout + done.stderr


def test_two_builds_of_one_library_do_not_meet(tmp_path, monkeypatch):
    """The second one links while the first one does; each replaces the library by its own."""
    out, linked = tmp_path / "libatedm.so", []
    monkeypatch.setattr(build, "objects", lambda folder: [])

    def link(command):
        path = Path(command[-1])
        path.write_text(f"{len(linked)}, half")
        linked.append(path)
        if len(linked) == 1:
            build.build_library(out)
            assert out.read_text() == "1, whole"
        path.write_text(path.read_text().replace("half", "whole"))

    monkeypatch.setattr(build, "_run", link)
    build.build_library(out)
    assert out.read_text() == "0, whole" and list(tmp_path.iterdir()) == [out]

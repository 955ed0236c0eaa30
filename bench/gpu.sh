#!/usr/bin/env bash
# Runs everything that needs a GPU, on a bare machine without network: tests, benchmarks, memory checkers.
#
#   bash bench/gpu.sh [RESULTS [WHEELS]]      (default: outputs/gpu and .whl)
#
# Requires Python with torch, triton and pytest; other packages (diffusers, tomesd) are installed from the wheels in
# WHEELS. Ends within nine minutes; $MINUTES sets another limit. The most important steps run first, each step has its
# own limit, and finished results stay when the rest is cut. RESULTS/log.txt shows how each step ended.
# STEPS="tests ops" runs only these of: doctor tests graphs ops unet unet-2048 sanitizers.
set -u
cd "$(dirname "$0")/.." || exit 1
RESULTS=$(realpath -m "${1:-outputs/gpu}")
WHEELS=${2:-.whl}
LIMIT=$((60 * ${MINUTES:-9}))
STEPS=" ${STEPS:-doctor tests graphs ops unet unet-2048 sanitizers} "
PYTHON=${PYTHON:-python3}
LOG=$RESULTS/log.txt
mkdir -p "$RESULTS"
: >"$LOG"
FAILED=0

step() { # name, maximum seconds, command
    local name=$1 limit=$2 began=$SECONDS left=$((LIMIT - SECONDS - 10))
    shift 2
    if ((left < 15)); then
        echo "SKIPPED $name: no time left" | tee -a "$LOG"
        return
    fi
    echo "BEGIN $name: $*" | tee -a "$LOG"
    # The signal is that of Ctrl-C, so the benchmarks print what they have.
    timeout --signal=INT --kill-after=10 $((left < limit ? left : limit)) "$@" >>"$LOG" 2>&1
    local status=$?
    ((status == 0)) || FAILED=1
    echo "END $name: status $status, $((SECONDS - began)) s" | tee -a "$LOG"
}

wanted() { [[ $STEPS == *" $1 "* ]]; }

# This checkout's packages, laid out as an installation has them.
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
ln -s "$PWD/atedm_kernels" "$PWD/python/atedm" "$PWD"/python/atedm_*.py "$SITE/"
ln -s "$PWD/bench" "$SITE/atedm_bench"
if compgen -G "$WHEELS/*.whl" >/dev/null; then
    step wheels 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl
fi
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COLUMNS=200
unset TRITON_INTERPRET

if wanted doctor; then
    step imports 60 "$PYTHON" -c "import atedm_bench.ops.run, atedm_bench.unet; print(atedm_bench.__file__)"
    step doctor 60 "$PYTHON" -m atedm doctor --json "$RESULTS/doctor.json"
fi
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider -o addopts=--import-mode=importlib)
if wanted tests; then
    step tests 120 "${PYTEST[@]}" tests/kernels --deselect tests/kernels/test_compile.py --junitxml "$RESULTS/tests.xml"
fi
if wanted graphs; then
    step graphs 90 "${PYTEST[@]}" tests/plugin/test_gpu.py --junitxml "$RESULTS/graphs.xml"
fi
if wanted ops; then
    step ops 150 "$PYTHON" -m atedm_bench ops --device cuda --minutes 2 --json "$RESULTS/ops.json"
fi
# Batch 2 is one image with guidance. Regional compilation takes seconds; compiling the whole UNet takes minutes.
for batch in 2 8; do
    if wanted unet; then
        step "unet, batch $batch" 110 "$PYTHON" -m atedm_bench unet --device cuda --batch $batch --regional \
            --variant full --variant ours --variant tomesd --minutes 1 --json "$RESULTS/unet-1024-b$batch.json"
    fi
done
for batch in 2 8; do
    if wanted unet-2048; then
        step "unet, 2048, batch $batch" 90 "$PYTHON" -m atedm_bench unet --device cuda --batch $batch --size 2048 \
            --regional --variant full --variant ours --variant tomesd --minutes 1 \
            --json "$RESULTS/unet-2048-b$batch.json"
    fi
done
if wanted sanitizers && command -v compute-sanitizer >/dev/null; then
    step "small calls" 60 "$PYTHON" -m tests.helpers.small_calls # compiles first, which would take long under a checker
    for tool in memcheck racecheck synccheck; do
        # Without torch's memory cache, every tensor has its own bounds.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step $tool 90 compute-sanitizer --tool $tool --error-exitcode 9 \
            "$PYTHON" -m tests.helpers.small_calls
    done
elif wanted sanitizers; then
    echo "SKIPPED sanitizers: compute-sanitizer is not installed" | tee -a "$LOG"
fi
echo "Results in $RESULTS, $SECONDS s" | tee -a "$LOG"
exit $FAILED

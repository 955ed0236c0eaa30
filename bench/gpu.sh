#!/usr/bin/env bash
# Everything that only a GPU can show, on a bare machine without network: tests, memory checker, benchmarks.
#
#   bash bench/gpu.sh [RESULTS [WHEELS]]      (default: outputs/gpu and .whl)
#
# Wants Python with torch, triton and pytest; what else is missing (diffusers, tomesd) is installed from the wheels in
# WHEELS. Ends within nine minutes ($MINUTES for another limit): steps come in order of weight, each has a limit of its
# own, and what is finished stays when the rest is cut. RESULTS/log.txt tells how each step ended.
set -u
cd "$(dirname "$0")/.." || exit 1
RESULTS=$(realpath -m "${1:-outputs/gpu}")
WHEELS=${2:-.whl}
LIMIT=$((60 * ${MINUTES:-9}))
PYTHON=${PYTHON:-python3}
LOG=$RESULTS/log.txt
mkdir -p "$RESULTS"
: >"$LOG"
FAILED=0

step() { # name, seconds at most, command
    local name=$1 most=$2 began=$SECONDS left=$((LIMIT - SECONDS - 10))
    shift 2
    if ((left < 15)); then
        echo "SKIPPED $name: no time left" | tee -a "$LOG"
        return
    fi
    echo "BEGIN $name: $*" | tee -a "$LOG"
    # Ctrl-C: the benchmarks then write what they have.
    timeout --signal=INT --kill-after=10 $((left < most ? left : most)) "$@" >>"$LOG" 2>&1
    local status=$?
    ((status == 0)) || FAILED=1
    echo "END $name: status $status, $((SECONDS - began)) s" | tee -a "$LOG"
}

if compgen -G "$WHEELS/*.whl" >/dev/null; then
    SITE=$(mktemp -d)
    step wheels 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl
    export PYTHONPATH=$SITE
fi
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COLUMNS=200
unset TRITON_INTERPRET

step versions 60 "$PYTHON" -m atedm doctor
step "GPU tests" 150 "$PYTHON" -m pytest -q tests/kernels --deselect tests/kernels/test_compile.py -p no:cacheprovider
step "bench ops" 110 "$PYTHON" -m atedm bench ops --device cuda --minutes 1.5 --json "$RESULTS/ops.json"
for batch in 1 4; do # guidance doubles them
    step "bench unet, batch $batch" 75 "$PYTHON" -m atedm bench unet --device cuda --batch $batch --regional \
        --minutes 1 --json "$RESULTS/unet-1024-b$batch.json"
done
if command -v compute-sanitizer >/dev/null; then
    # Without torch's cache of memory, every tensor has its own bounds.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$PYTHON" tests/kernels/small_calls.py
    step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" tests/kernels/small_calls.py
else
    echo "SKIPPED compute-sanitizer: not installed" | tee -a "$LOG"
fi
for batch in 1 4; do
    step "bench unet, 2048, batch $batch" 75 "$PYTHON" -m atedm bench unet --device cuda --batch $batch --size 2048 \
        --regional --minutes 1 --json "$RESULTS/unet-2048-b$batch.json"
done
echo "Results in $RESULTS, $SECONDS s" | tee -a "$LOG"
exit $FAILED

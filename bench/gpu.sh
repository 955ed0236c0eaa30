#!/usr/bin/env bash
# Runs everything that needs a GPU, on a bare machine without network: tests, benchmarks, tuning, memory checkers.
#
#   bash bench/gpu.sh [RESULTS [WHEELS]]      (default: outputs/gpu and .whl)
#
# Requires Python with torch, triton, pytest, pytest-xdist and diffusers. Missing packages are installed from the wheels in
# WHEELS; a peer that is missing there gets a row with the error. The script ends within nine minutes; $MINUTES sets another
# limit, in whole minutes. The most important steps run first. Each step has its own limit, and finished results stay if
# the rest is cut. RESULTS/log.txt shows how each step ended; RESULTS.tar.gz holds the folder.
# STEPS="tests ops" runs only those steps; all are: doctor tests tune unet ops compiled unet-8 unet-2048 sanitizers.
set -u
cd "$(dirname "$0")/.." || exit 1
RESULTS=$(realpath -m "${1:-outputs/gpu}")
WHEELS=${2:-.whl}
LIMIT=$((60 * ${MINUTES:-9}))
STEPS=" ${STEPS:-doctor tests tune unet ops compiled unet-8 unet-2048 sanitizers} "
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
    # SIGINT, as Ctrl-C sends it, so that the benchmarks print what they have.
    timeout --signal=INT --kill-after=10 $((left < limit ? left : limit)) "$@" >>"$LOG" 2>&1
    local status=$?
    ((status == 0)) || FAILED=1
    echo "END $name: status $status, $((SECONDS - began)) s" | tee -a "$LOG"
}

wanted() { [[ $STEPS == *" $1 "* ]]; }

# Lay out this checkout's packages as an installation would.
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
ln -s "$PWD/atedm_kernels" "$PWD/python/atedm" "$PWD"/python/atedm_*.py "$SITE/"
ln -s "$PWD/bench" "$SITE/atedm_bench"
if compgen -G "$WHEELS/*.whl" >/dev/null; then
    step wheels 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl
fi
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COLUMNS=200
unset TRITON_INTERPRET
BENCH=("$PYTHON" -m atedm_bench)
UNET=("${BENCH[@]}" unet --device cuda --repeats 10)
# Without the plug-ins that happen to be installed, which take longer to import than most tests run.
PYTEST=(env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$PYTHON" -m pytest -q -p xdist.plugin -p tests.helpers.failures_at_once
    -p no:cacheprovider -o addopts=--import-mode=importlib --durations 10)
# The variants of a call: full, and pruned as published, with cached updates, and with tokens chosen earlier.
CALLS=(--variant full --variant ours --variant "ours cached updates" --variant "ours tokens chosen before")
# Whole runs of the presets and their peers, in the same process, because it has found tomesd's ratio.
PEERS=(--variant tomesd)
for name in full default quality fast paper "DeepCache 2" "DeepCache 3" tomesd; do
    PEERS+=(--variant "run: $name")
done

if wanted doctor; then
    step imports 60 "$PYTHON" -c "import atedm_bench.ops.run, atedm_bench.unet; print(atedm_bench.__file__)"
    step doctor 60 "$PYTHON" -m atedm doctor --json "$RESULTS/doctor.json"
fi
if wanted tests; then
    # Leave out what runs only on the CPU. The ops do not import diffusers, which takes a bare machine half a minute.
    step tests 150 "${PYTEST[@]}" -n 14 tests/kernels --ignore tests/kernels/test_compile.py \
        --ignore tests/kernels/test_registry.py
    step "tests of the plug-in" 240 "${PYTEST[@]}" -n 8 tests/plugin/test_gpu.py
fi
if wanted tune; then
    # Writes the tables in place, so that the steps after it run with the new ones.
    step tune 180 "${BENCH[@]}" tune --tokens 4096,1024
    tar -cf "$RESULTS/tiles.tar" atedm_kernels/ops/*/tiles.json
fi
# Batch 2 is one image with guidance.
if wanted unet; then
    step unet 150 "${UNET[@]}" --batch 2 --run 25 "${CALLS[@]}" "${PEERS[@]}" --minutes 1.5 \
        --json "$RESULTS/unet-1024-b2.json"
fi
if wanted ops; then
    step ops 120 "${BENCH[@]}" ops --device cuda --size 1024 --dtype bf16 --no-compile --minutes 1 --json "$RESULTS/ops.json"
fi
# Regional compilation takes seconds; compiling the whole UNet takes minutes.
if wanted compiled; then
    step compiled 150 "${UNET[@]}" --batch 2 --regional "${CALLS[@]}" --minutes 2 \
        --json "$RESULTS/unet-1024-b2-compiled.json"
fi
if wanted unet-8; then
    step "unet, batch 8" 110 "${UNET[@]}" --batch 8 "${CALLS[@]}" --minutes 1 \
        --json "$RESULTS/unet-1024-b8.json"
fi
if wanted unet-2048; then
    step "unet, 2048" 90 "${UNET[@]}" --batch 2 --size 2048 "${CALLS[@]}" --minutes 1 \
        --json "$RESULTS/unet-2048-b2.json"
fi
if wanted sanitizers && command -v compute-sanitizer >/dev/null; then
    step "small calls" 60 "$PYTHON" -m tests.helpers.small_calls # compiles first, which would take long under a checker
    for tool in memcheck initcheck racecheck synccheck; do
        # Without torch's memory cache, every tensor is an allocation with its own bounds.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step $tool 90 compute-sanitizer --tool $tool --error-exitcode 9 \
            "$PYTHON" -m tests.helpers.small_calls
    done
elif wanted sanitizers; then
    echo "SKIPPED sanitizers: compute-sanitizer is not installed" | tee -a "$LOG"
fi
echo "Results in $RESULTS, $SECONDS s" | tee -a "$LOG"
tar -czf "$RESULTS.tar.gz" -C "$(dirname "$RESULTS")" "$(basename "$RESULTS")"
exit $FAILED

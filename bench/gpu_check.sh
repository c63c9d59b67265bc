#!/usr/bin/env bash
# Run everything that needs a GPU, in under ten minutes and without network: build the kernels for this GPU, time every op
# against its roof and every installed peer (after checking each against the reference), run every CUDA test, profile every
# kernel, and run every op under compute-sanitizer. The most important stages come first, and every stage has a time limit.
# Needs torch, nvcc, ninja, pybind11, setuptools and pytest; ncu and compute-sanitizer come with nvcc's toolkit.
#
#   bench/gpu_check.sh [--dry-run] [OUT]
#
# OUT: folder for the results, by default bench/results/<device>: ops.json (updated after every measurement), ncu.csv,
# gpu_check.md (the result of every stage, and the times) and gpu_check.log (the output of the stages). --dry-run only prints
# the commands and needs no GPU.
# Environment: PYTHON, the interpreter (python3); GPU_CHECK_SECONDS, the time for all stages (570); COMMIT, the commit that
# is tested, if git cannot tell.
# Exit status: 0 if every stage passed, 1 if one did not, 2 if there is no GPU.
set -uo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

dry_run=
out=
for argument in "$@"; do
    case $argument in
        -h | --help) usage && exit 0 ;;
        --dry-run) dry_run=1 ;;
        -*) usage >&2 && exit 2 ;;
        *) out=$(realpath -m "$argument") ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
readonly dry_run python=${PYTHON:-python3} total=${GPU_CHECK_SECONDS:-570}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" # for nvcc and compute-sanitizer
COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null)}
export COMMIT

# Print the compute capability, the CPU level to build, and the folder for the results, one per line. The first import of
# torch on a fresh machine reads gigabytes.
facts=$(timeout --kill-after=5 180 "$python" - <<'EOF'
import torch
from bench import records
from hypenet_kernels import _native

if not torch.cuda.is_available():
    raise SystemExit
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}{'a' if major == 9 else ''}")
print(_native.level())
print(records.folder("cuda"))
EOF
)
if [[ -z $facts && -z $dry_run ]]; then
    echo "gpu_check: $python sees no GPU through torch" >&2
    exit 2
fi
{ read -r capability && read -r level && read -r folder; } <<<"$facts"
readonly out=${out:-${folder:-bench/results/DEVICE}}
readonly log=$out/gpu_check.log
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${capability:-9.0a}} FORCE_CUDA=1
export HYPENET_CPU_LEVELS=${HYPENET_CPU_LEVELS:-${level:-baseline}} # the GPU would wait for the others

failures=0
summary=()

# stage NAME SECONDS COMMAND...: run a command with a time limit and its output in the log; later stages run even if it fails.
stage() {
    local name=$1 limit=$2 started=$SECONDS code=0 result said
    shift 2
    if [[ -n $dry_run ]]; then
        printf '%-21s at most %3d s: %s\n' "$name" "$limit" "$*"
        return
    fi
    ((limit = total - SECONDS < limit ? total - SECONDS : limit))
    printf '\n== %s: %s\n' "$name" "$*" >>"$log"
    if ((limit <= 0)); then
        result='not run: no time left'
    else
        timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 </dev/null
        code=$?
        case $code in
            0) result=passed ;;
            124 | 137) result="timed out after $limit s" ;;
            *) result="failed ($code)" ;;
        esac
    fi
    [[ $result == passed ]] || ((failures += 1))
    said=$(tail -n 1 "$log" | grep -v '^== ' | tr '|' '/' | cut -c 1-160)
    summary+=("| $name | $result | $((SECONDS - started)) s | $said |")
    echo "${summary[-1]}"
    write_summary
}

write_summary() {
    {
        printf '# GPU check\n\n%s, commit %s\n\n' "$(date -u +%FT%TZ)" "${COMMIT:-unknown}"
        printf '| stage | result | time | last line |\n|---|---|---:|---|\n'
        printf '%s\n' "${summary[@]}"
        if [[ -f $out/ops.json ]]; then
            echo && "$python" -m bench.tables "$out/ops.json"
        fi
    } >"$out/gpu_check.md"
}

# sanitize TOOL SECONDS OPTION...: run every op under a tool of compute-sanitizer. Without torch's caching allocator every
# tensor is an allocation of its own, so that accesses past its end are found. Only this library's kernels are checked.
sanitize() {
    local tool=$1 limit=$2
    shift 2
    stage "$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "$@" \
        --kernel-name kns=hypenet --error-exitcode 9 --print-limit 20 "$python" tests/every_op.py --head-dims 128 64
}

# The limits of all stages add up to more than the total. Those up to and including the tests always fit, so that at least
# every op's quick cases are timed; the rest usually fits too, because few stages need their whole limit.
[[ -n $dry_run ]] || { mkdir -p "$out" && rm -f "$out/ops.json" && : >"$log"; } || exit 2
stage device 15 sh -c 'nvcc --version | tail -n 2
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader'
stage build 120 "$python" setup.py --quiet build_ext --inplace
stage self-test 45 "$python" -m hypenet_kernels
stage timing-first 100 "$python" -m bench.supervise cuda "$out/ops.json" --quick
# One process per file: after an illegal memory access, no CUDA call in the same process succeeds.
for file in tests/test_cuda_{gated_delta,gated_delta_bwd,accuracy,hype_attention,hype_attention_decode,step,sequence_split,serving,causal_conv1d,fused_ops,decode_graph}.py; do
    name=${file#tests/test_cuda_}
    stage "${name%.py}" 25 "$python" -m pytest -m cuda -vv -rfE -o faulthandler_timeout=20 -p no:cacheprovider "$file"
done
# Shared memory, HMMA issue, occupancy and L2 of every kernel of every op, once.
stage profile 60 ncu --csv --log-file "$out/ncu.csv" --kernel-name regex:hypenet --launch-count 40 --page raw \
    --section SpeedOfLight --section Occupancy --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis \
    --section LaunchStats "$python" tests/every_op.py --once --tokens 4096
stage timing 130 "$python" -m bench.supervise cuda "$out/ops.json"
sanitize synccheck 45
sanitize memcheck 60 --padding 64 --report-api-errors no
sanitize racecheck 60

[[ -n $dry_run ]] && exit 0
echo "written to $out; $failures stages did not pass"
((failures == 0))

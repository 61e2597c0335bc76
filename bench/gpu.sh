#!/usr/bin/env bash
# Everything that wants a GPU, in one command and under 8 minutes: first whether the kernels are right, then how fast.
#   bench/gpu.sh [--write]        --write also puts the tables into bench/RESULTS.md
# A section whose command this checkout lacks is left out, and said so; a section that fails does not stop the others.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
write=("$@")
failed=()

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "there is no GPU here" >&2; exit 2; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
commands=$("$python" -m bench --help)

section() { # title, seconds at most, command...
    local title=$1 limit=$2
    shift 2
    printf '\n== %s  (%s s so far)\n' "$title" "$SECONDS"
    timeout "$limit" "$@" || failed+=("$title")
}

bench() { # title, seconds at most, benchmark, options...
    local title=$1 limit=$2 name=$3
    shift 3
    local help=""
    if grep -qE "^  $name( |$)" <<<"$commands"; then
        help=$("$python" -m bench "$name" --help)
    fi
    if [ -n "$help" ] && { [[ " $* " != *" --device "* ]] || grep -q -- --device <<<"$help"; }; then
        section "$title" "$limit" "$python" -m bench "$name" "$@" ${write[@]+"${write[@]}"}
    else
        printf '\n== %s: left out, this checkout has no "bench %s" for a GPU\n' "$title" "$name"
    fi
}

checks() { # four processes: most of the time goes into compiling
    local one="every_gradient" two="real_sizes or bits or slices or merge" status=0 part folder
    folder=$(mktemp -d)
    for part in "$one" "$two" "not ($one or $two)"; do
        "$python" -m pytest -q tests/test_kernels_triton.py -k "$part" >"$folder/$part" 2>&1 &
    done
    "$python" -m pytest -q tests/test_t5_kernel.py >"$folder/T5" 2>&1 &
    for part in 1 2 3 4; do wait -n || status=1; done
    tail -n 12 "$folder"/*
    rm -r "$folder"
    return "$status"
}

printf '\n== kernels against fp64, fp32 and below\n'
checks || failed+=("kernels against fp64")
section "other tests that need a GPU" 60 "$python" -m pytest -q -m gpu --ignore tests/test_kernels_triton.py --ignore tests/test_t5_kernel.py
bench "attention" 100 attention
bench "T5's bias" 30 t5-bias
bench "fused loss, bf16" 40 loss-head --device cuda --precision bf16 --tokens 8192 --rounds 3
bench "log-probability and entropy" 20 logprob
bench "decoding" 60 decode --device cuda
bench "training step" 120 train-step --device cuda --precision bf16 --questions 64 --images 64 --rounds 3

printf '\n%s s in all' "$SECONDS"
if [ ${#failed[@]} -gt 0 ]; then
    printf '; failed:'
    printf ' [%s]' "${failed[@]}"
    echo
    exit 1
fi
echo

#!/usr/bin/env bash
# Everything that wants a GPU, in one command and under 8 minutes: first whether the kernels are right, then how fast.
#   bench/gpu.sh [--write]        --write also puts the tables into bench/RESULTS.md
# fp32 is checked before anything else. A section whose command this checkout lacks is left out, and said so; one that
# fails or takes too long does not stop the others, and what it had said by then has been said. SECONDS_IN_ALL is what
# all of it may take; sections that no longer fit are named at the end.
set -u
self=$(cd "$(dirname "$0")" && pwd)/gpu.sh
cd "$(dirname "$self")/.."
python=${PYTHON:-python}
in_all=${SECONDS_IN_ALL:-470}
write=("$@")
failed=()

checks() { # words for pytest: these tests, split over four processes, because most of the time goes into compiling
    local tests=() chosen workers=4 worker place folder status=0
    mapfile -t tests < <("$python" -m pytest --collect-only "$@" | grep ::)
    if [ ${#tests[@]} -eq 0 ]; then
        echo "no test found: are pytest and Triton installed?"
        return 1
    fi
    folder=$(mktemp -d)
    trap 'tail -n 25 "$folder"/*; rm -r "$folder"; exit 143' TERM # of the time limit
    for ((worker = 0; worker < workers && worker < ${#tests[@]}; worker++)); do
        chosen=()
        for ((place = worker; place < ${#tests[@]}; place += workers)); do chosen+=("${tests[place]}"); done
        "$python" -m pytest --tb=short "${chosen[@]}" >"$folder/$worker" 2>&1 &
    done
    for ((; worker > 0; worker--)); do wait -n || status=1; done
    tail -n 25 "$folder"/*
    rm -r "$folder"
    return "$status"
}

if [ "${1-}" = checks ]; then # so that a section can put the function above under its time limit
    shift
    checks "$@"
    exit
fi

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "there is no GPU here" >&2; exit 2; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
commands=$("$python" -m bench --help)

section() { # title, seconds at most, command...
    local title=$1 limit=$2 left=$((in_all - SECONDS)) status=0
    shift 2
    printf '\n== %s  (%s s so far)\n' "$title" "$SECONDS"
    if [ "$left" -lt 5 ]; then
        echo "no time left"
        failed+=("$title: no time left")
        return
    fi
    [ "$limit" -le "$left" ] || limit=$left
    timeout --kill-after=5 "$limit" "$@" || status=$?
    case $status in
    0) ;;
    124 | 137) failed+=("$title: cut off after $limit s") ;;
    *) failed+=("$title") ;;
    esac
}

bench() { # title, seconds at most, benchmark, options...
    local title=$1 limit=$2 name=$3
    shift 3
    if grep -qE "^  $name( |$)" <<<"$commands"; then
        section "$title" "$limit" "$python" -m bench "$name" "$@" ${write[@]+"${write[@]}"}
    else
        printf '\n== %s: left out, this checkout has no "bench %s"\n' "$title" "$name"
    fi
}

section "kernels against fp64, in fp32" 80 bash "$self" checks tests/test_kernels_triton.py -k fp32
section "the other tests of the kernels" 80 bash "$self" checks tests/test_kernels_triton.py tests/test_t5_kernel.py -k "not fp32"
section "other tests that need a GPU" 45 "$python" -m pytest -q -m gpu --ignore tests/test_kernels_triton.py --ignore tests/test_t5_kernel.py
bench "attention" 100 attention --seconds 75
bench "T5's bias" 30 t5-bias
bench "fused loss, bf16" 40 loss-head --device cuda --precision bf16 --tokens 8192 --rounds 3
bench "log-probability and entropy" 20 logprob
bench "decoding" 90 decode --device cuda --size gpt2 --precision bf16
bench "training step" 120 train-step --device cuda --precision bf16 --questions 64 --images 64 --rounds 3

printf '\n%s s in all' "$SECONDS"
if [ ${#failed[@]} -gt 0 ]; then
    printf '; failed:'
    printf ' [%s]' "${failed[@]}"
    echo
    exit 1
fi
echo

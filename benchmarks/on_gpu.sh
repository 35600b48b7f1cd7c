#!/usr/bin/env bash
# All that needs a GPU, within 10 minutes: its tests and its benchmarks. The result files that they write and their output
# go to $OUT/on_gpu.tar after each command, so that they are there where a later one fails or the time ends.
#
# OUT=FOLDER bash benchmarks/on_gpu.sh
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1
logs=$(mktemp -d) most=570  # seconds of all together
touch "$logs/started"

run() {  # NAME SECONDS COMMAND...
    local start=$SECONDS left=$((most - SECONDS))
    timeout -k 5 $(($2 < left ? $2 : left > 1 ? left : 1)) "${@:3}" > "$logs/$1.log" 2>&1
    echo "$1: rc $?, $((SECONDS - start)) s"
    find benchmarks/results -type f -newer "$logs/started" -print0 |
        tar -cf "$OUT/on_gpu.tar" --null -T - -C "$logs" .
}

run tests 100 python3 -m pytest tests/test_cuda.py
run same_bits 150 python3 benchmarks/same_bits.py --device cuda
run partition 240 python3 benchmarks/partition.py --device cuda
run mask_throughput 180 python3 benchmarks/mask_throughput.py --device cuda
run step 60 python3 benchmarks/step.py --device cuda
run step_profile 60 python3 benchmarks/step.py --device cuda --profile
run scaling 120 python3 benchmarks/scaling.py --device cuda

#!/usr/bin/env bash
# One check of everything that needs a GPU: at most 9 minutes on one H100, start-up included.
#
#   scripts/gpu_check.sh FOLDER            all of it; the output goes into FOLDER
#   scripts/gpu_check.sh --small FOLDER    a minute on a CPU: does the script itself work?
#
# Each step has a time limit of its own, and its failure does not stop the rest. FOLDER/steps.tsv
# has a line for each: name, exit status, seconds. FOLDER/NAME.log has what it said. The time goes to
# the most telling first, so what is missing at the end is what can be missed.
#
# PYTHON names the interpreter (default: .venv/bin/python, else python), SECONDS_LEFT the whole time.
set -u
small=
[ "${1:-}" = --small ] && { small=1; shift; }
out=${1:?usage: scripts/gpu_check.sh [--small] FOLDER}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} WANDB_MODE=offline HYDRA_FULL_ERROR=1
end=$((SECONDS + ${SECONDS_LEFT:-540}))
: > "$out/steps.tsv"

# step NAME SECONDS COMMAND...: run it within its seconds, and within what is left of the whole time
step() {
    local name=$1 limit=$2 begun=$SECONDS left=$((end - SECONDS)) status
    shift 2
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 1 ]; then
        printf '%s\tleft out\t0\n' "$name" | tee -a "$out/steps.tsv"
        return
    fi
    timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
    status=$?
    printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - begun)) | tee -a "$out/steps.tsv"
}

where() {
    git log -1 --oneline
    nvidia-smi
    lscpu | sed -n '1,20p'
}

export -f where
export python

if [ -n "$small" ]; then
    training=(data=digits model=digits model.depth=1 data.train_size=64 data.batch_size=8 monitor.window=2
        full.scheduler.warmup_t=1 switch/criterion=at_epoch switch.criterion.epoch=1)
    bits=(12)
    updates=(--small)
    export OMP_NUM_THREADS=1
else
    training=(data=fake model=vit_small_patch16_224 data.train.size=2048 data.batch_size=128 epochs=11
        monitor.window=50 full.precision=bf16 full.scheduler.warmup_t=5 system.workers=8
        switch/criterion=at_epoch switch.criterion.epoch=5)
    bits=(36 monitor.window=6 switch.criterion.epoch=1.5)
    updates=()
fi

step where 20 bash -c where
step tests 80 "$python" -m pytest -q -m cuda $(grep -l mark.cuda tests/test_*.py) -p no:cacheprovider
step eager 100 "$python" scripts/gpu_updates.py --out "$out" --only eager --seconds 90 "${updates[@]}"
[ -n "$small" ] || step compiled 150 "$python" scripts/gpu_updates.py --out "$out" --only compiled --seconds 110
[ -n "$small" ] || step kernels 40 "$python" scripts/gpu_updates.py --out "$out" --kernels
step bits 60 "$python" scripts/gpu_bits.py "$out" "${bits[0]}" "${training[@]}" "${bits[@]:1}"
[ -n "$small" ] || step training 60 "$python" -m switchlora "${training[@]}" log=quiet log.wandb.mode=disabled max_updates=128 "hydra.run.dir=$out/training"
[ -n "$small" ] || step predicted 40 "$python" scripts/bench.py --model vit_small_patch16_224 --precision bf16 --batch 128 --rounds 3 --warmup 1 --out "$out/bench"
[ -n "$small" ] || step tables 30 "$python" scripts/gpu_updates.py --out "$out" --table

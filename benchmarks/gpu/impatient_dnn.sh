#!/usr/bin/env bash
# Table 1 of Impatient DNNs on a GPU machine without network, in commands of at most ten minutes. From the repository's root:
#     SCALE=gpu bash benchmarks/gpu/impatient_dnn.sh
# Environment: OUT, folder for what comes back (results.tar.gz, when all is done, and state.tar.gz.* in pieces); SCALE (gpu);
# SEEDS (the scale's); WORKERS (4 trainings share the GPU); SECONDS_LIMIT (480: then Ctrl-C, which leaves checkpoints).
# Carried in .gpu, which git ignores (.git/info/exclude): whl/*.whl (greenlet, kornia, kornia_rs, if the machine lacks them);
# data/* (of the shared data: load.py, cifar10_*.npz, gtsrb32_*.npz); state/state.tar.gz.* (of the last command).
# The data take 172 MiB and a command carries 64, so the first two commands on a fresh machine only bring data, with SCALE=none:
#     load.py cifar10_train_a gtsrb32_test | cifar10_train_b cifar10_test | gtsrb32_train_a gtsrb32_train_b, with SCALE=gpu
# Nothing needs the GTSRB files once all *-pretrained-* runs are in the state.
set -euo pipefail
OUT=${OUT:-runs/gpu-out} SCALE=${SCALE:-gpu} SEEDS=${SEEDS:-} WORKERS=${WORKERS:-4} SECONDS_LIMIT=${SECONDS_LIMIT:-480}
PYTHON=${PYTHON:-python3}
RUNS=${RUNS:-runs/papers/impatient_dnn}
export IMPATIENT_DATA=${IMPATIENT_DATA:-/tmp/impatient-data} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
mkdir -p "$OUT" "$IMPATIENT_DATA" "$RUNS"

if compgen -G '.gpu/whl/*.whl' >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .gpu/whl/*.whl
fi
export PYTHONPATH="src:/tmp/site${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G '.gpu/data/*' >/dev/null; then cp -n .gpu/data/* "$IMPATIENT_DATA"/; fi
if [ "$SCALE" = none ]; then exit 0; fi
if compgen -G '.gpu/state/state.tar.gz.*' >/dev/null; then cat .gpu/state/state.tar.gz.* | tar xz --skip-old-files -C "$RUNS"; fi

code=0
timeout -s INT -k 90 "$SECONDS_LIMIT" "$PYTHON" -m papers.impatient_dnn --scale "$SCALE" ${SEEDS:+--seeds "$SEEDS"} \
  --workers "$WORKERS" --runs "$RUNS" --out "$OUT/results" || code=$?

# what fits into a few files of 16 MiB: tables, finished runs and pretrained weights; half-done ones stay on this machine
if [ -d "$OUT/results" ]; then tar cz -C "$OUT" --remove-files -f "$OUT/results.tar.gz" results; fi
tar cz -C "$RUNS" --exclude 'checkpoint.safetensors' "$SCALE" | split -b 15m - "$OUT/state.tar.gz."
ls -l "$OUT"
case $code in 0 | 124 | 130) exit 0 ;; *) exit "$code" ;; esac # stopped by the limit is no failure: call again

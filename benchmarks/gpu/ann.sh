#!/usr/bin/env bash
# The ANN paper's tables on a GPU machine without network, in commands of at most ten minutes. From the repository's root:
#     SCALE=gpu bash benchmarks/gpu/ann.sh
# Environment: OUT, folder for what comes back (results.tar.gz and state.tar.gz.* in pieces); SCALE (gpu); TABLE (all);
# WORKERS (4 trainings share the GPU); SECONDS_LIMIT (480: then Ctrl-C, which leaves checkpoints; the tables are written after).
# Carried in .gpu, which git ignores (.git/info/exclude): whl/*.whl (greenlet, kornia, kornia_rs, if the machine lacks
# them); data/* (the shared data's load.py and cifar10_*.npz, in several commands where they are too large for one);
# state/state.tar.gz.* (of the last command, to go on on a fresh machine).
# CIFAR-10 takes 93 MiB and a command carries 64: call with SCALE=none first and one half of data/, then with the rest.
set -euo pipefail
OUT=${OUT:-runs/gpu-out} SCALE=${SCALE:-gpu} TABLE=${TABLE:-all} WORKERS=${WORKERS:-4} SECONDS_LIMIT=${SECONDS_LIMIT:-480}
PYTHON=${PYTHON:-python3}
RUNS=runs/papers/anytime_neural_networks
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
timeout -s INT -k 90 "$SECONDS_LIMIT" "$PYTHON" -m papers.anytime_neural_networks --scale "$SCALE" --table "$TABLE" \
  --workers "$WORKERS" --runs "$RUNS" --out "$OUT/results" || code=$?

# what fits into a few files of 16 MiB: tables, and finished trainings; half-done ones stay on this machine
if [ -d "$OUT/results" ]; then tar cz -C "$OUT" --remove-files -f "$OUT/results.tar.gz" results; fi
tar cz -C "$RUNS" --exclude 'checkpoint.safetensors' "$SCALE" | split -b 15m - "$OUT/state.tar.gz."
ls -l "$OUT"
case $code in 0 | 124 | 130) exit 0 ;; *) exit "$code" ;; esac  # stopped by the limit is no failure: call again

#!/usr/bin/env bash
# One paper's tables on a GPU machine without network, in commands of at most ten minutes. From the repository's root:
#     bash benchmarks/gpu/paper.sh impatient_dnn
#     bash benchmarks/gpu/paper.sh anytime_neural_networks --table milestones
#     bash benchmarks/gpu/paper.sh anytimenet --table accuracy
#     bash benchmarks/gpu/paper.sh adaptive_neural_networks --table networks
# What follows the paper's name goes to `python -m papers.NAME`.
#
# Environment: OUT, folder for what comes back (results.tar.gz, and state.tar.gz.* in pieces); SCALE (gpu; smoke to try it out on a
# CPU; none to bring data only); WORKERS (4 trainings share the GPU); SECONDS_LIMIT (480: then Ctrl-C, which leaves checkpoints).
# Carried in .gpu, which git ignores: whl/*.whl (greenlet, lightning_fabric, if the machine lacks them); data/* (the
# shared data's load.py, *.npz and *.npz.xz); state/state.tar.gz.* (of the last command, to go on on a fresh machine).
# A command carries 64 MiB, so on a fresh machine bring larger data in several commands, all but the last with SCALE=none:
#     impatient_dnn, anytimenet: load.py cifar10_train_a gtsrb32_test | cifar10_train_b cifar10_test | gtsrb32_train_a gtsrb32_train_b
#     anytime_neural_networks: load.py cifar10_train_a | cifar10_train_b cifar10_test
#     adaptive_neural_networks: load.py cifar10_train_a | cifar10_train_b cifar10_test cifar10_resnets | fashion_mnist ag_news_ids
set -euo pipefail
PAPER=${1:?name a paper: impatient_dnn, anytime_neural_networks, anytimenet or adaptive_neural_networks}
shift
OUT=${OUT:-runs/gpu-out} SCALE=${SCALE:-gpu} WORKERS=${WORKERS:-4} SECONDS_LIMIT=${SECONDS_LIMIT:-480} PYTHON=${PYTHON:-python3}
RUNS=${RUNS:-runs/papers/$PAPER}
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
timeout -s INT -k 90 "$SECONDS_LIMIT" "$PYTHON" -m "papers.$PAPER" --scale "$SCALE" --workers "$WORKERS" --runs "$RUNS" \
  --out "$OUT/results" "$@" || code=$?

# what fits into a few files of 16 MiB: tables, finished runs and their weights; half-done ones stay on this machine
if [ -d "$OUT/results" ]; then tar cz -C "$OUT" --remove-files -f "$OUT/results.tar.gz" results; fi
tar cz -C "$RUNS" --exclude 'checkpoint.safetensors' "$SCALE" | split -b 15m - "$OUT/state.tar.gz."
ls -l "$OUT"
case $code in 0 | 124 | 130) exit 0 ;; *) exit "$code" ;; esac # stopped by the limit is no failure: call again

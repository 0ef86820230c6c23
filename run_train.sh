#!/usr/bin/env bash
# Train: ./run_train.sh --config FILE [--section.key value ...]
# FILE is a path or a name in train_configs/; --help lists every setting, --print-config prints the
# resolved config; neither trains.
#
# Environment (all optional):
#   NGPU           processes on this node (default: the GPUs present, else 1)
#   LOG_RANK       local ranks whose output is shown, e.g. 0 or 0,3 (default 0)
#   NNODES         nodes of the run (default 1); every node runs this same command. MIN:MAX: begin
#                  with as many of MAX as come, go on with those that are left, at least MIN
#   MAX_RESTARTS   times that all processes are started again after a failure (default 0)
#   STOP_GRACE_S   seconds to finish a step and save after SIGTERM, SIGUSR1 or Ctrl-C (default 1800);
#                  then the status is 75, and the same command goes on. A second one ends all at once
#   RDZV_ENDPOINT  host:port where the nodes of the run meet (RDZV_ID names the run), or instead
#   MASTER_ADDR    host of the first node, with NODE_RANK (0 .. NNODES-1) and MASTER_PORT (29500)
#   TITAN_PYTHON, TITAN_NO_VENV: see scripts/setup_env.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
die() { printf 'error: %s\n' "$*" >&2; exit 2; }
count() { [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1: expected a number of at least 1, got '$2'"; }

python=$("$root/scripts/setup_env.sh")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

for word in "$@"; do
    case $word in -h | --help | --print-config) exec "$python" -m titan_vlm.config "$@" ;; esac
done
"$python" -m titan_vlm.config "$@" # a mistake in the config is said here, once and in one line

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^ ]' || true)
fi
NGPU=${NGPU:-$((gpus > 0 ? gpus : 1))}
NNODES=${NNODES:-1}
MAX_RESTARTS=${MAX_RESTARTS:-0}
LOG_RANK=${LOG_RANK:-0}
count NGPU "$NGPU"
[[ $NNODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ && ${NNODES%:*} -le ${NNODES#*:} ]] ||
    die "NNODES: expected a number of at least 1, or MIN:MAX such as 2:4, got '$NNODES'"
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || die "MAX_RESTARTS: expected a number, got '$MAX_RESTARTS'"
[ -z "${STOP_GRACE_S:-}" ] || count STOP_GRACE_S "$STOP_GRACE_S"
[[ $LOG_RANK =~ ^[0-9]+(,[0-9]+)*$ ]] || die "LOG_RANK: expected local ranks such as 0 or 0,3, got '$LOG_RANK'"

if [ "$gpus" -eq 0 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    # Share the cores out; torchrun would give each of several processes a single thread.
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > NGPU ? cores / NGPU : 1))
fi

if [ "$NNODES" = 1 ]; then
    meet=(--standalone --local-addr 127.0.0.1) # a free port; no need for the host's name to resolve
elif [ -n "${RDZV_ENDPOINT:-}" ]; then
    meet=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-titan_vlm}")
elif [[ $NNODES == *:* ]]; then
    die "NNODES=$NNODES: expected RDZV_ENDPOINT=host:port, where nodes that come and go meet"
elif [ -n "${MASTER_ADDR:-}" ] && [ -n "${NODE_RANK:-}" ]; then
    meet=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    die "NNODES=$NNODES: expected RDZV_ENDPOINT=host:port, or MASTER_ADDR=host with NODE_RANK=0..$((NNODES - 1))"
fi

# -P: the scripts folder must not shadow modules that torch imports.
exec "$python" -P "$root/scripts/launch.py" --nnodes "$NNODES" --nproc-per-node "$NGPU" \
    --local-ranks-filter "$LOG_RANK" "${meet[@]}" --max-restarts "$MAX_RESTARTS" -m titan_vlm.train "$@"

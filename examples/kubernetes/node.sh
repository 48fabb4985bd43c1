#!/usr/bin/env bash
# What each node of the job runs: torchrun, and then the exit code of the process that failed first, which torchrun hides.
set -euo pipefail

: "${NODES:?}" "${GPUS:?}" "${MASTER_ADDR:?}" "${JOB_COMPLETION_INDEX:?}"
PSFT_EXIT_CODE_FILE=$(mktemp -d)/code
export PSFT_EXIT_CODE_FILE

told="" child="" code=0
trap 'told=143; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM
torchrun --nnodes "$NODES" --node-rank "$JOB_COMPLETION_INDEX" --nproc-per-node "$GPUS" \
    --master-addr "$MASTER_ADDR" --master-port 29500 -m megatron_psft "$@" &
child=$!
[[ -z $told ]] || kill -TERM "$child"
# A signal to this shell cuts `wait` short.
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
wait "$child" || code=$?

case $code in
    0) exit 0 ;;
    126 | 127) exit 2 ;; # there is no torchrun
esac
if [[ -s $PSFT_EXIT_CODE_FILE ]]; then exit "$(<"$PSFT_EXIT_CODE_FILE")"; fi
# Killed without a word: its memory was used up, NCCL gave a peer up, or it was told to end before it could save.
exit "${told:-4}"

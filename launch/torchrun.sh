#!/usr/bin/env bash
# One node's share of a run: torchrun on the worker, the same command on every node.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29500 NPROC_PER_NODE=8 launch/torchrun.sh CONFIG.yaml [key=value ...]
#
# All variables have defaults for a single node with one rank. SIGUSR1 or SIGTERM asks the run to save and leave: the
# status is then 75, and the same command with run.resume=auto goes on. A SIGTERM that comes 5 s later, or Ctrl-C, ends it.
set -uo pipefail

if (($# == 0)); then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

# What the ranks say to this script and it to them: a signal would be lost on those that still import their libraries.
files=$(mktemp -d "${TMPDIR:-/tmp}/rlx-node.XXXXXX")
export RLX_REQUEUE_FILE=$files/requeue RLX_CAUSE_FILE=$files/cause RLX_STOP_FILE=$files/stop
trap 'rm -rf "$files"' EXIT

# What Megatron says at every import, in every rank, about packages that are optional here.
notices="ignore:Transformer Engine and Apex are not installed,ignore:Apex is not installed,ignore:full scope is deprecated"
export PYTHONWARNINGS="${PYTHONWARNINGS:-$notices}"
# Arguments and files are UTF-8, whatever the locale.
export PYTHONUTF8=1

torchrun=
ended=
term_at=
# A scheduler may send its SIGTERM twice at once.
# shellcheck disable=SC2329
on_term() {
  if [[ -z $term_at ]]; then
    term_at=$SECONDS
    : >"$RLX_STOP_FILE"
  elif ((SECONDS - term_at >= 5)); then
    end 15
  fi
}
# shellcheck disable=SC2329
end() {
  ended=$((128 + $1))
  kill -TERM "$torchrun" 2>/dev/null
}
trap ': >"$RLX_STOP_FILE"' USR1
trap on_term TERM
trap 'end 2' INT
trap 'end 1' HUP

# torchrun would take SIGUSR1 as an order to end; the ranks set a handler of their own.
(
  trap '' USR1
  exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${NPROC_PER_NODE:-1}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" --max-restarts 0 \
    -m rlx.cli.worker "$@"
) &
torchrun=$!

# A trapped signal interrupts wait.
while :; do
  wait "$torchrun"
  status=$?
  kill -0 "$torchrun" 2>/dev/null || break
done

if ((status == 0)) && [[ -s $RLX_REQUEUE_FILE ]]; then
  exit 75
fi
# Below torchrun's own account: what the rank that failed first had to say.
((status == 0)) || head -n 3 "$RLX_CAUSE_FILE" >&2 2>/dev/null
((status == 0)) || exit "${ended:-$status}"

#!/usr/bin/env bash
# One node's share of a run: torchrun on the worker, the same command on every node.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29500 NPROC_PER_NODE=8 launch/torchrun.sh CONFIG.yaml [key=value ...]
#
# All variables have defaults for a single node with one rank. SIGUSR1 asks the run to save and leave: the status is
# then 75, and the same command with run.resume=auto goes on. SIGTERM ends it.
set -uo pipefail

if (($# == 0)); then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

RLX_REQUEUE_FILE=$(mktemp "${TMPDIR:-/tmp}/rlx-requeue.XXXXXX")
RLX_CAUSE_FILE=$(mktemp "${TMPDIR:-/tmp}/rlx-cause.XXXXXX")
export RLX_REQUEUE_FILE RLX_CAUSE_FILE
trap 'rm -f "$RLX_REQUEUE_FILE" "$RLX_CAUSE_FILE"' EXIT

# What Megatron says at every import, in every rank, about packages that are optional here.
notices="ignore:Transformer Engine and Apex are not installed,ignore:Apex is not installed,ignore:full scope is deprecated"
export PYTHONWARNINGS="${PYTHONWARNINGS:-$notices}"
# Arguments and files are UTF-8, whatever the locale.
export PYTHONUTF8=1

# torchrun would take SIGUSR1 as an order to end; it ignores it, and the ranks set a handler of their own.
(
  trap '' USR1
  exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${NPROC_PER_NODE:-1}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" --max-restarts 0 \
    -m rlx.cli.worker "$@"
) &
torchrun=$!

# The ranks are torchrun's children. Of a process's stat, what follows the name in parentheses is: state, parent.
# shellcheck disable=SC2329
ask_ranks() {
  local stat text fields
  for stat in /proc/[0-9]*/stat; do
    read -r text 2>/dev/null <"$stat" || continue
    read -ra fields <<<"${text##*) }"
    [[ ${fields[1]} == "$torchrun" ]] && kill -USR1 "${text%% *}" 2>/dev/null
  done
}
trap ask_ranks USR1
trap 'kill -TERM "$torchrun" 2>/dev/null' TERM INT HUP

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
((status == 0)) || head -n 3 "$RLX_CAUSE_FILE" >&2
exit "$status"

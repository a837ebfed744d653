#!/usr/bin/env bash
# posttrain train on two "nodes" of this machine: network namespaces with an address each, joined by a cable.
#   sudo bash scripts/two_nodes.sh CONFIG.yaml [KEY=VALUE | --resume | --overwrite]...
#
# One CPU process per node, DDP over gloo, rendezvous at the first node's address, as on two real machines with
# configs/accelerate/two_nodes.yaml; run_dir lies on the file system that both see. Needs Linux, root and
# iproute2. POSTTRAIN_NODES=NAME names the namespaces NAME-0 and NAME-1: 'ip netns pids NAME-1' lists who to
# kill to see what happens when a machine dies.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-$ROOT/.venv/bin/python}"
NODES="${POSTTRAIN_NODES:-posttrain$$}"

if [ "$#" -eq 0 ]; then
  sed -n '2,3s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
if ! command -v ip >/dev/null; then
  echo "two_nodes.sh needs the command ip (package iproute2)" >&2
  exit 2
fi
if ! ip netns add "$NODES-0"; then
  echo "two_nodes.sh cannot make network namespaces: it needs Linux and root" >&2
  exit 2
fi
cleanup() {
  for node in 0 1; do
    ip netns pids "$NODES-$node" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
    ip netns del "$NODES-$node" 2>/dev/null || true
  done
}
trap cleanup EXIT
trap 'exit 130' INT TERM
ip netns add "$NODES-1"
# interface names are short; both ends can have the same one, as each lives in its own namespace
ip -n "$NODES-0" link add node0 type veth peer name node0 netns "$NODES-1"
for node in 0 1; do
  ip -n "$NODES-$node" link set lo up
  ip -n "$NODES-$node" addr add "10.77.0.$((node + 1))/24" dev node0
  ip -n "$NODES-$node" link set node0 up
done

pids=()
for node in 0 1; do
  ip netns exec "$NODES-$node" env GLOO_SOCKET_IFNAME=node0 "$PYTHON" -m accelerate.commands.launch \
    --config_file "$ROOT/configs/accelerate/cpu_ddp.yaml" --num_machines 2 --num_processes 2 \
    --machine_rank "$node" --main_process_ip 10.77.0.1 --main_process_port 29500 \
    -m posttrain train "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || code=1
done
exit "$code"

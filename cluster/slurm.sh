#!/usr/bin/env bash
# Run distprune on the nodes of a Slurm allocation:  sbatch cluster/slurm.sh prune --config run.yaml
#
# Every node gets a Ray node; the first one, where this script runs, is the head, and distprune runs there too. Activate
# the environment that has distprune before sbatch. It and the output must be on a file system that all nodes see.
#
# Five minutes before the time limit Slurm sends SIGTERM: distprune ends with 130, the job goes back into the queue, and
# the same command resumes there. Any other exit status of distprune is the job's own.
#
# `ray symmetric-run` would be shorter, but it ends every Ray of yours on the node, also that of another job.
# Whoever reaches Ray's ports can run code as you, so each job has a token of its own.
#SBATCH --job-name=distprune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=distprune-%j.log
# A node that fails takes its Ray node with it, and not the job.
#SBATCH --no-kill
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Jobs that share a node need ports of their own.
address=$(hostname --all-ip-addresses | awk '{print $1}'):$((20000 + SLURM_JOB_ID % 10000))
# On each node's own disk, and short: the paths of sockets have at most 107 characters.
folder=${SLURM_TMPDIR:-/tmp}/ray-$SLURM_JOB_ID
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
steps=()
driver=
interrupted=

start_ray() { # NODE OPTION...
    srun --nodes=1 --ntasks=1 --nodelist="$1" --cpus-per-task="$SLURM_CPUS_PER_TASK" --no-kill \
        ray start --block --disable-usage-stats --num-cpus="$SLURM_CPUS_PER_TASK" \
        --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="$folder" "${@:2}" >/dev/null &
    steps+=($!)
}

# distprune counts the nodes when it starts, so all must have joined.
wait_for_ray() {
    for _ in {1..60}; do
        [[ -z $interrupted ]] || return 0
        kill -0 "${steps[0]}" 2>/dev/null || break
        joined=$(ray status --address "$address" 2>/dev/null | grep -c '^ 1 node_') || joined=0
        ((joined < ${#nodes[@]})) || return 0
        sleep 2
    done
    echo "slurm.sh: Ray did not come up on all of ${nodes[*]}; see $folder/session_latest/logs on each" >&2
    return 1
}

interrupt() {
    interrupted=yes
    [[ -z $driver ]] || kill -TERM "$driver" 2>/dev/null || true
}

end_ray() {
    kill "${steps[@]}" 2>/dev/null || true
    wait "${steps[@]}" 2>/dev/null || true
}
trap interrupt TERM
trap end_ray EXIT

start_ray "${nodes[0]}" --head --node-ip-address="${address%:*}" --port="${address#*:}" --include-dashboard=false
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address="$address"
done
wait_for_ray
status=130
if [[ -z $interrupted ]]; then
    RAY_ADDRESS=$address distprune "$@" &
    driver=$!
    [[ -z $interrupted ]] || interrupt # it came just before
    # A signal ends a wait, and not yet distprune, which has things to put in order.
    while kill -0 "$driver" 2>/dev/null; do
        wait "$driver" || true
    done
    wait "$driver" && status=0 || status=$?
fi
# 143 is what Python ends with where it had hardly begun.
if [[ -n $interrupted && ($status == 130 || $status == 143) ]]; then
    end_ray
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

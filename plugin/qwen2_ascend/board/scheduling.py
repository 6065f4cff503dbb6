"""A launch on one node or several by hand, as a script for Slurm, as a job for Volcano.

The scripts are those of examples/cluster with the launch in them; docs/cluster.md explains them.
Flags are already quoted for a shell. On several nodes torchrun takes the number of its node from
PET_NODE_RANK, its own variable for --node-rank, so that no command has to be quoted twice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 96
IMAGE = "REGISTRY/qwen2-ascend:cann9.0.0-torch2.7.1"
DRIVER_VOLUMES = """\
            - name: driver
              hostPath: {path: /usr/local/Ascend/driver}
            - name: hccn
              hostPath: {path: /etc/hccn.conf}
"""
"""What an NPU's driver needs in a job for Volcano, with DRIVER_MOUNTS."""
DRIVER_MOUNTS = """\
                - {name: driver, mountPath: /usr/local/Ascend/driver, readOnly: true}
                - {name: hccn, mountPath: /etc/hccn.conf, readOnly: true}
"""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What torchrun is to start."""

    script: str
    flags: tuple[str, ...]
    """Each with its value, quoted for a shell."""
    num_nodes: int
    devices_per_node: int
    device: str
    """The value of --device: npu, cuda or cpu."""


def node(launch: Launch) -> str:
    """The command for one node, or for each of several, of which NODE_RANK and MASTER_ADDR say
    which it is and where the first one is."""
    return _wrapped(_words(launch, "$NODE_RANK"))


def slurm(launch: Launch) -> str:
    """A script for sbatch, which saves and queues up again ten minutes before its time is over."""
    command = _wrapped(_words(launch), indent="    ")
    gpus = f"#SBATCH --gpus-per-node={launch.devices_per_node}\n" * (launch.device == "cuda")
    return f"""\
#!/usr/bin/env bash
# sbatch THIS_FILE, in qwen2-ascend's repository and in a shell that has its environment.
#SBATCH --job-name=qwen2
#SBATCH --nodes={launch.num_nodes}
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
TORCHRUN_PID=$(mktemp)        # the file with the process id of torchrun on the first node
export MASTER_ADDR TORCHRUN_PID
trap 'rm -f "$TORCHRUN_PID"' EXIT

save_and_requeue() {{         # torchrun gets no signal: it would kill its ranks after 30 s
    pkill -TERM -P "$(cat "$TORCHRUN_PID")" || true
    wait "$STEP" || true
    scontrol requeue "$SLURM_JOB_ID"
}}
trap save_and_requeue TERM

srun --kill-on-bad-exit=1 bash -c '
    export PET_NODE_RANK=$SLURM_NODEID
    [ "$PET_NODE_RANK" != 0 ] || echo $$ > "$TORCHRUN_PID"
    exec "$@"' on-a-node \\
    {command} &
STEP=$!
wait "$STEP"
"""


def volcano(launch: Launch) -> str:
    """A job for `kubectl apply`; the image, the claim and the folders are to be changed."""
    command = json.dumps(f"exec {' '.join(_words(launch))}", ensure_ascii=False)
    devices = launch.devices_per_node
    resource = {"npu": "huawei.com/Ascend910", "cuda": "nvidia.com/gpu"}.get(launch.device)
    asked = f"{{{resource}: {devices}}}" if resource else '{cpu: "8"}'
    driver, mount = (DRIVER_VOLUMES, DRIVER_MOUNTS) if launch.device == "npu" else ("", "")
    return f"""\
# kubectl apply -f THIS_FILE, with your image, claim and paths. One pod takes a node.
apiVersion: batch.volcano.sh/v1alpha1
kind: Job
metadata:
  name: qwen2
spec:
  schedulerName: volcano
  minAvailable: {launch.num_nodes}
  maxRetry: 5
  plugins:
    env: []                   # sets VC_TASK_INDEX, the number of the pod
    svc: []                   # sets VC_NODE_HOSTS, the names of all pods
  policies:                   # the run goes on from its last checkpoint
    - {{event: PodFailed, action: RestartJob}}
    - {{event: PodEvicted, action: RestartJob}}
    - {{event: TaskCompleted, action: CompleteJob}}
  tasks:
    - name: node
      replicas: {launch.num_nodes}
      template:
        spec:
          restartPolicy: Never
          containers:
            - name: training
              image: {IMAGE}
              workingDir: /opt/qwen2-ascend
              command: [bash, -c]
              args:
                - >-
                  export PET_NODE_RANK=$VC_TASK_INDEX MASTER_ADDR=${{VC_NODE_HOSTS%%,*}};
                  eval "$TRAINING"
              env:
                - name: TRAINING
                  value: {command}
              resources:
                requests: {asked}
                limits: {asked}
              volumeMounts:
                - {{name: data, mountPath: /data}}
{mount}                - {{name: shm, mountPath: /dev/shm}}
          volumes:
            - name: data      # shared by all nodes (ReadWriteMany)
              persistentVolumeClaim: {{claimName: training-data}}
{driver}            - name: shm       # data loaders need more than the 64 MB that a pod has
              emptyDir: {{medium: Memory, sizeLimit: 64Gi}}
"""


def _words(launch: Launch, node_rank: str | None = None) -> list[str]:
    """The command; PET_NODE_RANK is the number of the node where `node_rank` is None."""
    words = ["torchrun"]
    if launch.num_nodes == 1:
        words.append("--standalone")
    else:
        words.append(f"--nnodes {launch.num_nodes}")
        words += [f"--node-rank {node_rank}"] if node_rank else []
    words.append(f"--nproc-per-node {launch.devices_per_node}")
    if launch.num_nodes > 1:
        words.append('--master-addr "$MASTER_ADDR" --master-port 29500')
    return [*words, launch.script, *launch.flags]


def _wrapped(words: Sequence[str], indent: str = "") -> str:
    lines, line = [], words[0]
    for word in words[1:]:
        if len(line) + len(word) > WIDTH:
            lines.append(line)
            line = f"{indent}    {word}"
        else:
            line = f"{line} {word}"
    return " \\\n".join([*lines, line])

#!/usr/bin/env bash
# Train on TPUs in a GKE cluster, by xpk. The only way to TPU7x.
set -euo pipefail

HELP='usage: xpk_launch.sh --image IMAGE [CAPACITY] [--slices N] [--restarts N] [--xla SET] [--dry-run] -- COMMAND...
       xpk_launch.sh --list | --delete [--dry-run]

Starts the workload TPU_NAME on TPU_TYPE in the cluster GKE_CLUSTER. GKE restarts it after a preemption (75), a crash (1) or a
signal (127 to 255), at most --restarts times; 2, 65 and 70 end it. COMMAND stays the same, so every restart resumes: its
--workdir must be on storage that all hosts mount.

  --image IMAGE    a Docker image with the project in it, see Dockerfile
  CAPACITY         --spot, --flex, --reservation NAME or --on-demand, for clusters that make nodes when they are needed
  --slices N       how many TPUs of this type work together (default: 1)
  --restarts N     (default: 20)
  --xla SET        compiler flags from xla_flags.txt (default: none)
  --list           the workloads of the cluster
  --delete         end the workload TPU_NAME
  --dry-run        print the command, do not run it

settings: TPU_PROJECT, TPU_ZONE, TPU_NAME, TPU_TYPE (see env.sh), GKE_CLUSTER

example: TPU_TYPE=tpu7x-2x2x2 tpu_scripts/xpk_launch.sh --image gcr.io/my-project/mmdiff:1 --spot --xla overlap \
           -- mmdiff train experiments/quickstart.py --workdir /mnt/runs/one'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=create image="" capacity=() slices=1 restarts=20 xla=none
while (($#)); do
  case $1 in
    --image) need_value "$@" && image=$2 && shift ;;
    --spot | --flex | --on-demand) capacity+=("$1") ;;
    --reservation) need_value "$@" && capacity+=("$1=$2") && shift ;;
    --slices) need_value "$@" && slices=$2 && shift ;;
    --restarts) need_value "$@" && restarts=$2 && shift ;;
    --xla) need_value "$@" && xla=$2 && shift ;;
    --list | --delete) action=${1#--} ;;
    --) break ;;
    *) option "$1" ;;
  esac
  shift
done
((${#capacity[@]} < 2)) || die "choose one of ${capacity[*]}" 2
# shellcheck source=SCRIPTDIR/env.sh
source "$HERE/env.sh"
setting GKE_CLUSTER "the name of the GKE cluster, for example: export GKE_CLUSTER=my-cluster"

where=(--cluster="$GKE_CLUSTER" "${PLACE[@]}")
case $action in
  list) run xpk workload list "${where[@]}" ;;
  delete) run xpk workload delete --workload="$TPU_NAME" "${where[@]}" ;;
  create)
    [[ -n $image ]] || die "--image is missing: build one from tpu_scripts/Dockerfile and push it" 2
    (($# > 1)) || die "give the command after --; see xpk_launch.sh --help" 2
    shift
    flags=$("$HERE/xla_flags.sh" "$GENERATION" "$xla")
    environment=()
    while read -r line; do
      [[ -z $line ]] || environment+=(--env="$line")
    done <<<"$flags"
    # five minutes to save, as under Slurm
    run xpk workload create --workload="$TPU_NAME" "${where[@]}" --tpu-type="$TPU_TYPE" --num-slices="$slices" \
      --docker-image="$image" "${capacity[@]}" --max-restarts="$restarts" --restart-on-exit-codes=1,75 \
      --termination-grace-period-seconds=300 "${environment[@]}" --command="$(quoted "$@")"
    ;;
esac

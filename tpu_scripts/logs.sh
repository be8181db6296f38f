#!/usr/bin/env bash
# Show what the job on the TPU prints.
set -euo pipefail

HELP='usage: logs.sh [--worker N|all] [--lines N] [--follow] [--save DIR] [--dry-run]

  --worker N|all   whose log (default: 0); with all, every line begins with the number of its host
  --lines N        how many of the last lines (default: 50)
  --follow         go on printing as lines come
  --save DIR       copy the whole logs of all hosts to DIR/worker-N.log instead
  --dry-run        print the commands, run none of them

example: tpu_scripts/logs.sh --follow'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

worker=0 lines=50 follow="" save=""
while (($#)); do
  case $1 in
    --worker) need_value "$@" && worker=$2 && shift ;;
    --lines) need_value "$@" && lines=$2 && shift ;;
    --follow) follow=" -F" ;;
    --save) need_value "$@" && save=$2 && shift ;;
    *) option "$1" ;;
  esac
  shift
done
[[ $lines =~ ^[0-9]+$ ]] || die "--lines $lines is not a number" 2
# shellcheck source=SCRIPTDIR/env.sh
source "$HERE/env.sh"

log=mmdiff-jobs/latest/job.log
if [[ -n $save ]]; then
  workers=$(worker_count)
  run mkdir -p "$save"
  for ((worker = 0; worker < ${workers:-1}; worker++)); do
    run "${SCP[@]}" "$TPU_NAME:$log" "$save/worker-$worker.log" --worker="$worker"
  done
elif [[ $worker == all ]]; then
  # shellcheck disable=SC2016
  run "${SSH[@]}" --worker=all --command="tail -n $lines$follow $log"' | sed -u "s/^/[$(cat .mmdiff_worker)] /"'
else
  run "${SSH[@]}" --worker="$worker" --command="tail -n $lines$follow $log"
fi

#!/usr/bin/env bash
# What the TPU and the job on it are doing.
set -euo pipefail

HELP='usage: status.sh [--dry-run]

Prints the state of TPU_NAME, of the job on each host, and of the job as a whole (the last line):

  job running        all is well
  job failing CODE   some hosts ended with an error, others still run (they will notice)
  job exit CODE      all hosts have ended; the worst code decides: 2, 65, 70, then a crash, then 75, then 0
  job none           nothing was started yet
  job unknown        the TPU is not ACTIVE, or not all hosts answer for the same job

A host whose job vanished without an exit code (the machine restarted) counts as 137.

  --dry-run   print the commands, run none of them

example: tpu_scripts/status.sh'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while (($#)); do
  option "$1"
  shift
done
# shellcheck source=SCRIPTDIR/env.sh
source "$HERE/env.sh"

read -r state _ < <(tpu_state)
((DRY_RUN)) || echo "tpu $TPU_NAME $state"
[[ $state == ACTIVE ]] || ((DRY_RUN)) || { echo "job unknown" && exit 0; }
workers=$(worker_count) || workers=0
answers=$(quietly timeout "${ANSWER_SECONDS:-300}" "${SSH[@]}" --worker=all \
  --command="bash mmdiff/tpu_scripts/worker/job.sh state") || true
((!DRY_RUN)) || exit 0

# lines: worker NUMBER JOB running|exit CODE|lost|none; a job is named after the time of its start, or -
answers=$(grep '^worker ' <<<"$answers" | sort -k2,2n) || true
newest=$(cut -d' ' -f3 <<<"$answers" | sort | tail -n 1)
answered=0 running=0 codes=()
while read -r _ number job word code; do
  [[ -n $number ]] || continue
  echo "worker $number $job $word${code:+ $code}"
  [[ $job == "$newest" ]] || continue # this host was not reached when the newest job was started
  answered=$((answered + 1))
  case $word in
    running) running=$((running + 1)) ;;
    exit) codes+=("$code") ;;
    lost) codes+=(137) ;;
  esac
done <<<"$answers"

worst=$(worst_code "${codes[@]}")
if ((workers == 0 || answered < workers)); then
  echo "job unknown"
elif [[ $newest == - ]]; then
  echo "job none"
elif ((running == 0)); then
  echo "job exit $worst"
elif ((worst != 0)); then
  echo "job failing $worst"
else
  echo "job running"
fi

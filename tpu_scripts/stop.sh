#!/usr/bin/env bash
# Stop the job on the TPU, so that it saves first.
set -euo pipefail

HELP='usage: stop.sh [--wait SECONDS] [--kill] [--dry-run]

Sends SIGTERM to the job on every host of TPU_NAME: the trainer saves and ends with code 75. The TPU stays and goes on
costing: see delete.sh. A babysitter would start the job again: end it first.

  --wait SECONDS   how long to wait for the end (default: 300)
  --kill           kill what is still there after that
  --dry-run        print the command, do not run it

example: tpu_scripts/stop.sh'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

seconds=300 kill=""
while (($#)); do
  case $1 in
    --wait) need_value "$@" && seconds=$2 && shift ;;
    --kill) kill=" --kill" ;;
    *) option "$1" ;;
  esac
  shift
done
[[ $seconds =~ ^[0-9]+$ ]] || die "--wait $seconds is not a number of seconds" 2
# shellcheck source=SCRIPTDIR/env.sh
source "$HERE/env.sh"

run "${SSH[@]}" --worker=all --command="bash mmdiff/tpu_scripts/worker/job.sh stop --wait $seconds$kill"

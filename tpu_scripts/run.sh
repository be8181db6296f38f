#!/usr/bin/env bash
# Start a command on all hosts of the TPU and leave it running.
set -euo pipefail

HELP='usage: run.sh [--xla SET] [--dry-run] -- COMMAND...

Starts COMMAND in ~/mmdiff on every host of TPU_NAME, detached: it outlives the connection. Each host keeps a log and, when
the command has ended, its exit code: see status.sh and logs.sh. One command at a time.

  --xla SET    compiler flags from xla_flags.txt (default: none)
  --dry-run    print the command, do not run it

examples:
  tpu_scripts/run.sh -- mmdiff train experiments/quickstart.py --workdir /mnt/runs/one
  tpu_scripts/run.sh -- python tpu_scripts/pod_check.py'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

xla=none
while (($#)); do
  case $1 in
    --xla) need_value "$@" && xla=$2 && shift ;;
    --) break ;;
    *) option "$1" ;;
  esac
  shift
done
(($# > 1)) || die "give the command after --, for example: run.sh -- mmdiff train EXPERIMENT.py --workdir /mnt/runs/one" 2
shift
# shellcheck source=SCRIPTDIR/env.sh
source "$HERE/env.sh"

flags=$("$HERE/xla_flags.sh" "$GENERATION" "$xla") # lines NAME=VALUE
environment=()
[[ -z $flags ]] || mapfile -t environment <<<"$flags"
((${#environment[@]} == 0)) || set -- env "${environment[@]}" "$@"
fraction=${EPOCHREALTIME:-} # bash 5 knows the time below the second
TZ=UTC printf -v name '%(%Y%m%dT%H%M%S)T.%s' -1 "${fraction#*[.,]}" # sorts by time
run "${SSH[@]}" --worker=all --command="bash mmdiff/tpu_scripts/worker/job.sh start $name -- $(quoted "$@")"
((DRY_RUN)) || say "started $name on $TPU_NAME: $(quoted "$@")"

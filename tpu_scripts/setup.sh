#!/usr/bin/env bash
# Make a new TPU ready: ssh keys, code, Python.
set -euo pipefail

HELP='usage: setup.sh [--commit COMMIT | --dirty] [--dry-run]

Makes all hosts of TPU_NAME ready to run: reaches each of them once by ssh, sends the code (sync.sh), installs Python and
the project (worker/install.sh). Can be repeated at any time: what is done already is skipped.

  --commit, --dirty   as in sync.sh
  --dry-run           print the commands, run none of them

On several hosts gcloud wants your key in an ssh agent: ssh-add ~/.ssh/google_compute_engine

example: tpu_scripts/setup.sh'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

what=()
while (($#)); do
  case $1 in
    --commit) need_value "$@" && what+=("$1" "$2") && shift ;;
    --dirty) what+=("$1") ;;
    *) option "$1" ;;
  esac
  shift
done
# shellcheck source=SCRIPTDIR/env.sh
source "$HERE/env.sh"

workers=$(worker_count)
# keys reach new hosts with a delay, and --worker=all fails as a whole if one of them is not there yet
for ((worker = 0; worker < ${workers:-1}; worker++)); do
  retry "${SSH[@]}" --worker="$worker" --command="echo $worker >.mmdiff_worker"
done
"$HERE/sync.sh" "${what[@]}"
retry "${SSH[@]}" --worker=all --command="bash mmdiff/tpu_scripts/worker/install.sh"
((DRY_RUN)) || say "$TPU_NAME is ready ($workers hosts)"

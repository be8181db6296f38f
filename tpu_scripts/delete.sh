#!/usr/bin/env bash
# Give the TPU back.
set -euo pipefail

HELP='usage: delete.sh --yes [--dry-run]

Deletes the queued resource TPU_NAME with its machines and their disks: logs and all that was not written to storage
elsewhere is lost. This ends the costs of the TPU.

  --yes       without it nothing is deleted
  --dry-run   print the command, do not run it

example: tpu_scripts/delete.sh --yes'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

yes=0
while (($#)); do
  case $1 in
    --yes) yes=1 ;;
    *) option "$1" ;;
  esac
  shift
done
# shellcheck source=SCRIPTDIR/env.sh
source "$HERE/env.sh"

((yes || DRY_RUN)) || die "this deletes $TPU_NAME ($TPU_TYPE in $TPU_ZONE) and its disks; if you mean it: delete.sh --yes" 2
run gcloud compute tpus queued-resources delete "$TPU_NAME" "${PLACE[@]}" --force --quiet
((DRY_RUN)) || say "deleted $TPU_NAME"

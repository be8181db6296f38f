#!/usr/bin/env bash
# Ask Google Cloud for a TPU and wait until it is there.
set -euo pipefail

HELP='usage: create.sh CAPACITY [--no-wait] [--dry-run]

Asks for the TPU named TPU_NAME as a queued resource and waits until it is ACTIVE. A request that ended FAILED or
SUSPENDED (preempted, or its time is over) is deleted and made again, but only if its label says that it is yours. An
ACTIVE one is left as it is, so the command can be repeated.

CAPACITY, one of:
  --spot               cheap, and taken away at any time
  --reserved           from a reservation of the project
  --reservation NAME   from this reservation
  --flex DURATION      for a fixed time of at most 7 days, for example --flex 12h
  --on-demand          neither of these

  --no-wait            return once the request is in the queue
  --dry-run            print the commands, run none of them

settings: TPU_PROJECT, TPU_ZONE, TPU_NAME, TPU_TYPE (see env.sh); POLL_SECONDS (60), CREATE_ATTEMPTS (20)

example: TPU_TYPE=v6e-16 tpu_scripts/create.sh --spot'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${CREATE_ATTEMPTS:=20}"
chosen=() capacity=() track=() wait_for_it=1 # track: gcloud knows some of these flags only in alpha
while (($#)); do
  case $1 in
    --spot | --reserved) chosen+=("$1") capacity=("$1") ;;
    --on-demand) chosen+=("$1") ;;
    --reservation)
      need_value "$@"
      chosen+=("$1") capacity=(--reservation="$2") track=(alpha)
      shift
      ;;
    --flex)
      need_value "$@"
      chosen+=("$1") capacity=(--provisioning-model=flex-start --max-run-duration="$2") track=(alpha)
      shift
      ;;
    --no-wait) wait_for_it=0 ;;
    *) option "$1" ;;
  esac
  shift
done
((${#chosen[@]} == 1)) || die "choose one of --spot, --reserved, --reservation NAME, --flex DURATION, --on-demand" 2
# shellcheck source=SCRIPTDIR/env.sh
source "$HERE/env.sh"
[[ $GENERATION != tpu7x ]] || die "TPU7x machines come only through GKE: use xpk_launch.sh" 2

make_request() {
  say "asking for $TPU_NAME ($TPU_TYPE, ${chosen[0]#--})"
  run gcloud "${track[@]}" compute tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" "${PLACE[@]}" \
    --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_IMAGE" --labels=mmdiff_owner="$TPU_OWNER" --quiet \
    "${capacity[@]}" "${CREATE_FLAGS[@]}"
}

# without --force gcloud refuses to delete a request that still holds machines
delete_request() {
  [[ $owner == "$TPU_OWNER" ]] ||
    die "$TPU_NAME is $state, but its label mmdiff_owner is '$owner', not '$TPU_OWNER': delete.sh --yes, or another TPU_NAME"
  say "$TPU_NAME is $state: deleting this request of yours, to make it again"
  quietly gcloud compute tpus queued-resources describe "$TPU_NAME" "${PLACE[@]}" --format='yaml(state)' >&2 || true
  quietly gcloud compute tpus queued-resources delete "$TPU_NAME" "${PLACE[@]}" --quiet
}

requests=0 silent=0 before=""
while :; do
  read -r state owner < <(tpu_state)
  [[ $state == "$before" ]] || say "$TPU_NAME: ${state:-not asked}"
  before=$state
  case $state in
    ACTIVE) exit 0 ;;
    ABSENT | "") # "" in a dry run
      ((requests < CREATE_ATTEMPTS)) || die "$TPU_NAME: $requests requests came to nothing (CREATE_ATTEMPTS); see above"
      # a first request that is refused has a mistake in it; a later one may find the quota not free yet
      make_request || ((requests > 0)) || die "the request was refused; see above"
      requests=$((requests + 1))
      ((wait_for_it && !DRY_RUN)) || exit 0
      ;;
    FAILED | SUSPENDED)
      delete_request || say "could not delete it yet"
      requests=$((requests > 0 ? requests : 1))
      ;;
    UNKNOWN)
      silent=$((silent + 1))
      ((silent < 30)) || die "$TPU_NAME: gcloud has failed 30 times; see above"
      ;;
    *) ;; # WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING and the like pass by themselves
  esac
  sleep "$POLL_SECONDS"
done

#!/usr/bin/env bash
# Keep a training run going on a TPU that may be taken away, until it is done or cannot succeed.
set -euo pipefail

HELP='usage: babysit.sh CAPACITY [--xla SET] [--crashes K] [--within MINUTES] [--dry-run] -- COMMAND...

Creates TPU_NAME, sets it up, runs COMMAND and watches. COMMAND is always the same, with the same --workdir, so every new
start resumes. The commit checked out now is the one that is sent every time. What follows from the end of the job:

  exit 0                     done: stops with 0
  exit 2, 65, 70             wrong usage, bad configuration or data, diverged: stops with that code
  exit 75                    preempted after a save: runs again at once, uncounted
  TPU FAILED or SUSPENDED    deletes this request of yours, makes it again, sets up, runs again, uncounted
  TPU deleted by somebody    stops with 1
  anything else              a crash: runs again after a pause that doubles; the Kth within MINUTES stops with its code

When it stops, the TPU is left as it is and goes on costing. Ending the babysitter does not end the job; started again, it
watches a job that is still running.

  CAPACITY           as in create.sh: --spot, --reserved, --reservation NAME, --flex DURATION, --on-demand
  --xla SET          as in run.sh
  --crashes K        (default: 3)
  --within MINUTES   (default: 60)
  --dry-run          print the commands of one round, run none of them

settings: as create.sh; BACKOFF_SECONDS (30), GRACE_SECONDS (300: for hosts that run on after another has failed)

example: tpu_scripts/babysit.sh --spot -- mmdiff train experiments/quickstart.py --workdir /mnt/runs/one'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${BACKOFF_SECONDS:=30}" "${GRACE_SECONDS:=300}"
capacity=() xla=none limit=3 minutes=60
while (($#)); do
  case $1 in
    --spot | --reserved | --on-demand) capacity+=("$1") ;;
    --reservation | --flex) need_value "$@" && capacity+=("$1" "$2") && shift ;;
    --xla) need_value "$@" && xla=$2 && shift ;;
    --crashes) need_value "$@" && limit=$2 && shift ;;
    --within) need_value "$@" && minutes=$2 && shift ;;
    --) break ;;
    *) option "$1" ;;
  esac
  shift
done
(($# > 1)) || die "give the command after --, for example: babysit.sh --spot -- mmdiff train E.py --workdir /mnt/runs/one" 2
shift
[[ $limit =~ ^[1-9][0-9]*$ && $minutes =~ ^[1-9][0-9]*$ ]] || die "--crashes and --within want whole numbers above 0" 2
# shellcheck source=SCRIPTDIR/env.sh
source "$HERE/env.sh"

# a workdir on the TPU's own disk would be lost with the TPU
workdir=""
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --workdir) ((i == $#)) || workdir=${*:i+1:1} ;;
    --workdir=*) workdir=${!i#--workdir=} ;;
  esac
done
case $workdir in
  /*) ;;
  *) die "--workdir '$workdir' would be lost with the TPU: give an absolute path on storage that all hosts mount" 2 ;;
esac
commit=$(git -C "$HERE" rev-parse HEAD)
[[ -z $(git -C "$HERE" status --porcelain) ]] || say "the working tree has changes: they are not sent, only commit $commit is"

set_up_and_run() { "$HERE/setup.sh" --commit "$commit" && "$HERE/run.sh" --xla "$xla" -- "$@"; }

if ((DRY_RUN)); then
  "$HERE/create.sh" "${capacity[@]}"
  set_up_and_run "$@"
  "$HERE/status.sh"
  exit 0
fi

# look: sets tpu and job from status.sh
look() {
  local status
  status=$("$HERE/status.sh") || status=""
  tpu=${status#"tpu $TPU_NAME "} tpu=${tpu%%$'\n'*}
  job=${status##*$'\n'job }
}

# follow: returns when the job or the TPU has come to an end; sets outcome to an exit code, "preempted" or "deleted"
follow() {
  local silent=0 failing_since=""
  while :; do
    look
    silent=$((silent + 1))
    case $tpu in
      ACTIVE | UNKNOWN | "") ;;
      ABSENT | DELETING) outcome=deleted && return ;;
      *) outcome=preempted && return ;;
    esac
    case $job in
      running) silent=0 ;;
      exit\ *) outcome=${job#exit } && return ;;
      failing\ *)
        silent=0
        : "${failing_since:=$SECONDS}"
        if ((SECONDS - failing_since >= GRACE_SECONDS)); then
          say "some hosts failed (${job#failing }) and others run on: stopping them"
          "$HERE/stop.sh" --wait 30 --kill || true
        fi
        ;;
    esac
    ((silent < 30)) || { say "the hosts have not answered 30 times" && outcome=1 && return; }
    sleep "$POLL_SECONDS"
  done
}

crashes=() # their times, within the last MINUTES
while :; do
  "$HERE/create.sh" "${capacity[@]}" || exit $?
  look
  if [[ $job == running || $job == failing* ]]; then
    say "a job runs on $TPU_NAME already: watching it"
    follow
  elif set_up_and_run "$@"; then
    follow
  else
    look
    outcome=1
    [[ $tpu == ACTIVE ]] || outcome=preempted
    [[ $tpu != ABSENT ]] || outcome=deleted
    "$HERE/stop.sh" --wait 0 --kill || true # some hosts may have started it
  fi
  case $outcome in
    0) say "done" && exit 0 ;;
    2 | 65 | 70) say "the job ended with $outcome: running it again would not help" && exit "$outcome" ;;
    75) say "preempted after a save: running again" && continue ;;
    preempted) say "$TPU_NAME is $tpu: the run goes on when there is a new one" && continue ;;
    deleted) die "$TPU_NAME was deleted by somebody: not made again" ;;
  esac
  now=$(date +%s) recent=()
  for crash in "${crashes[@]}" "$now"; do
    ((now - crash >= minutes * 60)) || recent+=("$crash")
  done
  crashes=("${recent[@]}")
  say "crash with code $outcome, number ${#crashes[@]} within $minutes minutes"
  ((${#crashes[@]} < limit)) || { say "that is enough: see logs.sh" && exit "$outcome"; }
  sleep $((BACKOFF_SECONDS * 2 ** (${#crashes[@]} - 1)))
done

# shellcheck shell=bash disable=SC2034 # the scripts that source this file use what is set here
# What the scripts in this folder share. A script sets HELP, sources this file, reads its options, then sources env.sh.

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export DRY_RUN="${DRY_RUN:-0}" # a script started by another inherits it
exec 3>&1                      # where a dry run prints, also from inside $(...)

# one line on stderr, with the time
say() { TZ=UTC printf '%(%FT%TZ)T %s: %s\n' -1 "$(basename "$0")" "$*" >&2; }

# die MESSAGE [CODE]: one line on stderr, and the end; code 2 is a mistake of the caller
die() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit "${2:-1}"
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash $BASH_VERSION is too old: 4.4 or newer, please" 2

# option ARGUMENT: what every script understands; anything else is an error
option() {
  case $1 in
    -h | --help) printf '%s\n' "$HELP" && exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    *) die "unknown argument '$1'; see $(basename "$0") --help" 2 ;;
  esac
}

# need_value "$@": an option that takes a value must not come last
need_value() { (($# > 1)) || die "$1 needs a value; see $(basename "$0") --help" 2; }

# setting NAME REMEDY: an environment variable that must be set
setting() { [[ -n "${!1:-}" ]] || die "$1 is not set: $2" 2; }

# run COMMAND...: run it, or in a dry run print it as it could be pasted into a shell
run() {
  if ((DRY_RUN)); then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    "$@"
  fi
}

# quietly COMMAND...: as run, but what it says on stderr is shown only if it fails
quietly() {
  local said code=0
  { said=$(run "$@" 2>&1 >&4) || code=$?; } 4>&1
  ((code == 0)) || printf '%s\n' "$said" >&2
  return "$code"
}

# retry COMMAND...: three times, with a pause
retry() {
  run "$@" || { sleep "$RETRY_SECONDS" && run "$@"; } || { sleep "$RETRY_SECONDS" && run "$@"; }
}
: "${RETRY_SECONDS:=20}"

# quoted WORD...: one line that a shell reads back as exactly these words
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# worst_code CODE...: the exit code of a job whose processes ended with these. First what must not be retried (2, 65, 70),
# then a crash, then 75, then 0: one 75 beside a crash counts as a crash, so that nothing is repeated for ever uncounted.
# Of several crashes the smallest code, for codes above 128 (signals) are often only the echo of another process's crash.
worst_code() {
  local code rank worst=0 worst_rank=9
  for code in "$@"; do
    case $code in
      2) rank=1 ;;
      65) rank=2 ;;
      70) rank=3 ;;
      75) rank=5 ;;
      0) rank=6 ;;
      *) rank=4 ;;
    esac
    if ((rank < worst_rank || (rank == worst_rank && code < worst))); then
      worst=$code worst_rank=$rank
    fi
  done
  echo "$worst"
}

# tpu_state: "STATE OWNER" of the queued resource TPU_NAME; STATE is ABSENT if there is none, UNKNOWN if nobody could tell
tpu_state() {
  local answer
  if answer=$(quietly gcloud compute tpus queued-resources describe "$TPU_NAME" "${PLACE[@]}" \
    --format='value(state.state,tpu.nodeSpec[0].node.labels.mmdiff_owner)' 2>&1); then
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    say "$answer"
    echo UNKNOWN
  fi
}

# worker_count: the number of hosts of TPU_NAME
worker_count() {
  quietly gcloud compute tpus tpu-vm describe "$TPU_NAME" "${PLACE[@]}" --format='value(networkEndpoints.len())'
}

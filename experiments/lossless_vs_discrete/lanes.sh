# shellcheck shell=bash
# Lanes of commands, one for each of two cores, that go on where they were stopped: for all.sh and systems.sh, which read this.
#
# Results lie in runs/lossless, what was printed and how long it took in runs/lossless/log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck disable=SC2034 # for those who read this
here=experiments/lossless_vs_discrete results=runs/lossless log=runs/lossless/log bin=${BIN:-.venv/bin}
mkdir -p "$log"
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages also for what scripts train themselves

# name, command: runs it once
step() {
  local name=$1 began=$SECONDS
  shift
  [ -e "$log/$name.done" ] && return
  if ! "$@" >"$log/$name.txt" 2>"$log/$name.err"; then
    echo "$name failed, see $log/$name.err" >&2
    return 1
  fi
  echo "$name: $((SECONDS - began)) s" | tee "$log/$name.done"
}
python() { step "$1" "$bin/python" "experiments/$2" "${@:3}"; }
script() { python "$1" "lossless_vs_discrete/$1.py" "${@:2}"; }
tokenizer() { step "$1" "$bin/mmdiff" train "$here/$2" --workdir "runs/tokenizers/$1" "${@:3}"; }
system() { step "$1" "$bin/mmdiff" train "$here/systems.py:$1" --workdir "runs/systems/$1"; }
tokenizers() { for name in "$@"; do printf 'runs/tokenizers/%s ' "$name"; done; }

pinned() { # core, lane
  if command -v taskset >/dev/null; then taskset -cp "$1" $BASHPID >/dev/null; fi
  "$2"
}
lanes() { # lane, lane
  local failed=0
  pinned 0 "$1" &
  pinned 1 "$2" &
  for lane in $(jobs -p); do wait "$lane" || failed=1; done # the other lane goes on when one fails
  [ $failed = 0 ]
}

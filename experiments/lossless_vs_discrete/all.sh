#!/usr/bin/env bash
# E0 to E4 and E9 with all they need, from nothing: two lanes of commands, one for each of two cores.
#
#   bash experiments/lossless_vs_discrete/all.sh
#   WORDS=data/words FACES=data/faces_32 bash experiments/lossless_vs_discrete/all.sh     with photographed words, and faces
#
# Results lie in runs/lossless, what was printed and how long it took in runs/lossless/log. Every command goes on where it was
# stopped, and so does this.
set -euo pipefail
cd "$(dirname "$0")/../.."
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
script() { step "$1" "$bin/python" "$here/$1.py" "${@:2}"; }
tokenizer() { step "$1" "$bin/mmdiff" train "$here/tokenizers.py:$2" --workdir "runs/tokenizers/$1" "${@:3}"; }
system() { step "$1" "$bin/mmdiff" train "$here/systems.py:$1" --workdir "runs/systems/$1"; }
tokenizers() { for name in "$@"; do printf 'runs/tokenizers/%s ' "$name"; done; }

lane_1() { # images of 32 x 32 pixels
  script input_layer --json
  for name in vq fsq continuous; do tokenizer $name $name; done
  # shellcheck disable=SC2046
  script drift --json --images shapes words --tokenizers $(tokenizers vq fsq continuous)
  system vq_ar
  script cliff --workdir $results/cliff
}
lane_2() { # of 64 x 64, and pixel by pixel
  for name in vq_64 fsq_64 continuous_64; do tokenizer $name $name; done
  tokenizer vq_64_shapes vq_64 --data.source shapes --data.generator draw 1
  # shellcheck disable=SC2046
  script readers --workdir $results/readers ${WORDS:+--words "$WORDS"} \
    --tokenizers $(tokenizers vq_64 fsq_64 continuous_64 vq_64_shapes)
  system pixels
  script entropy --workdir $results/entropy
}
pinned() { # core, lane
  if command -v taskset >/dev/null; then taskset -cp "$1" $BASHPID >/dev/null; fi
  "$2"
}
began=$SECONDS
pinned 0 lane_1 &
pinned 1 lane_2 &
failed=0
for lane in $(jobs -p); do wait "$lane" || failed=1; done # the other lane goes on when one fails
[ $failed = 0 ]
# shellcheck disable=SC2046
script rate --json --priors runs/systems/vq_ar --pixels runs/systems/pixels --tokenizers $(tokenizers vq fsq) \
  --images shapes words ${FACES:+"documents=$FACES"}
cp $log/input_layer.txt $results/input_layer.json
cp $log/drift.txt $results/drift.json
cp $log/rate.txt $results/rate.json
echo "all in $(((SECONDS - began) / 60)) minutes; $results, $log"

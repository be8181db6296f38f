#!/usr/bin/env bash
# E0 to E4 and E9 with all they need, from nothing: two lanes of commands, one for each of two cores.
#
#   bash experiments/lossless_vs_discrete/all.sh
#   WORDS=data/words FACES=data/faces_32 bash experiments/lossless_vs_discrete/all.sh     with photographed words, and faces
#
# What is done is not done again: the same command goes on where it was stopped (lanes.sh).
# shellcheck source-path=SCRIPTDIR source=lanes.sh
source "$(dirname "$0")/lanes.sh"

lane_1() { # images of 32 x 32 pixels
  script input_layer --json
  for name in vq fsq continuous; do tokenizer $name tokenizers.py:$name; done
  # shellcheck disable=SC2046
  script drift --into "$results/drift.json" --images shapes words --tokenizers $(tokenizers vq fsq continuous)
  for name in vq_ar pixels; do system $name; done
  script entropy --workdir "$results/entropy"
  script cliff --workdir "$results/cliff"
}
lane_2() { # of 64 x 64
  for name in vq_64 fsq_64 continuous_64; do tokenizer $name tokenizers.py:$name; done
  tokenizer vq_64_shapes tokenizers.py:vq_64 --data.source shapes --data.generator draw 1
  # shellcheck disable=SC2046
  script readers --workdir "$results/readers" ${WORDS:+--words "$WORDS"} \
    --tokenizers $(tokenizers vq_64 fsq_64 continuous_64 vq_64_shapes)
}
began=$SECONDS
lanes lane_1 lane_2
# shellcheck disable=SC2046
script rate --into "$results/rate.json" --priors runs/systems/vq_ar --pixels runs/systems/pixels --tokenizers $(tokenizers vq fsq) \
  --images shapes words ${FACES:+"documents=$FACES"}
cp "$log/input_layer.txt" "$results/input_layer.json"
echo "all in $(((SECONDS - began) / 60)) minutes; $results, $log"

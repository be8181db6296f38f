#!/usr/bin/env bash
# Every other system, from nothing: stand-ins, tokenizers, E5 of all arms (systems.py), E6 (lavit_arms.py, orders.py), E7
# (../frozen_lm/tasks.py), E10 (selector.py), E4 of these tokenizers, and E1, E3 and E9 of all. Two lanes of commands, one for
# each of two cores: a working day.
#
#   bash experiments/lossless_vs_discrete/systems.sh
#   WORDS=data/words FACES=data/faces_32 bash experiments/lossless_vs_discrete/systems.sh     with photographed words, and faces
#
# What is done is not done again: the same command goes on where it was stopped (lanes.sh). What all.sh has trained is taken.
# shellcheck source-path=SCRIPTDIR source=lanes.sh
source "$(dirname "$0")/lanes.sh"
stand_ins=runs/stand_ins

# name, file of systems, arms: E5 or E6 of these; all share a folder, so that an arm in two files is trained once
arms() { python "joint_$1" lossless_vs_discrete/joint.py --workdir "$results/joint" --systems "$here/$2" ${3:+--arms} "${@:3}"; }

lane_1() { # what LaVIT is made of, and the arms on raw patches and plain codes
  for name in lavit lavit_fixed lavit_bidirectional; do tokenizer $name semantic.py:$name; done
  arms lavit lavit_arms.py lavit lavit_regression lavit_fixed lavit_bidirectional lavit_continuous
  for name in vq fsq continuous; do tokenizer $name tokenizers.py:$name; done
  arms raw systems.py raw read vq_ar fsq_ar masked
  arms orders orders.py
}
lane_2() { # what reads features, and what a language model is asked about
  script selector --workdir "$results/selector"
  python qformer stand_ins/qformer.py --encoder $stand_ins/two_tower_32 --out $stand_ins/qformer
  for name in seed_pairs seed; do tokenizer $name semantic.py:$name; done
  python two_tower stand_ins/two_tower.py --out $stand_ins/two_tower
  python copying_lm stand_ins/copying_lm.py --out $stand_ins/copying_lm
  python words frozen_lm/words.py --language $stand_ins/copying_lm --towers $stand_ins/two_tower \
    --out runs/v2l/words.safetensors
  for name in v2l v2l_residual; do tokenizer $name tokenizers.py:$name; done
  python tasks frozen_lm/tasks.py --language $stand_ins/copying_lm --words runs/v2l/words.safetensors \
    --tokenizer runs/tokenizers/v2l --workdir "$results/frozen_lm"
  arms systems systems.py seed v2l v2l_residual llava flamingo blip2 emu
  for name in lavit_64 seed_pairs_64 seed_64; do tokenizer $name semantic.py:$name; done
  tokenizer v2l_64 tokenizers.py:v2l_64
  # shellcheck disable=SC2046
  python readers_systems lossless_vs_discrete/readers.py --workdir "$results/readers" ${WORDS:+--words "$WORDS"} \
    --tokenizers $(tokenizers lavit_64 seed_64 v2l_64)
}
began=$SECONDS
python two_tower_32 stand_ins/two_tower.py --side 32 --patch 4 --out $stand_ins/two_tower_32
lanes lane_1 lane_2
arms all systems.py # the page
pixels=runs/systems/pixels # of all.sh
# shellcheck disable=SC2046
python rate_systems lossless_vs_discrete/rate.py --into "$results/rate.json" \
  --priors $results/joint/{vq_ar,fsq_ar,v2l,lavit,seed}/seed-0-steps-800 $([ -d $pixels ] && echo --pixels $pixels) \
  --tokenizers $(tokenizers vq fsq v2l lavit seed) --images shapes words ${FACES:+"documents=$FACES"}
# shellcheck disable=SC2046
python drift_systems lossless_vs_discrete/drift.py --into "$results/drift.json" --images shapes words \
  --tokenizers $(tokenizers vq fsq continuous v2l lavit seed)
echo "all in $(((SECONDS - began) / 60)) minutes; $results, $log"

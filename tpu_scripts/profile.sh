#!/usr/bin/env bash
# Take a profiler trace of a few training steps on the TPU.
set -euo pipefail

HELP='usage: profile.sh --steps FIRST:LAST [--xla SET] [--dry-run] -- mmdiff train EXPERIMENT.py --workdir DIR ...
       profile.sh --fetch FOLDER --workdir DIR [--dry-run]

The first form is run.sh with --profile FIRST:LAST: the trainer writes a trace of these steps into DIR/profile and goes on.
Choose steps well after the first, which compiles, and a new workdir: a run that resumes beyond them traces nothing.
The second form copies the trace here, from host 0. To look at it: pip install xprof, xprof --logdir FOLDER

  --dry-run   print the commands, run none of them

example: tpu_scripts/profile.sh --steps 20:25 -- mmdiff train experiments/quickstart.py --workdir /mnt/runs/trace'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

steps="" folder="" workdir="" xla=none
while (($#)); do
  case $1 in
    --steps) need_value "$@" && steps=$2 && shift ;;
    --fetch) need_value "$@" && folder=$2 && shift ;;
    --workdir) need_value "$@" && workdir=$2 && shift ;;
    --xla) need_value "$@" && xla=$2 && shift ;;
    --) break ;;
    *) option "$1" ;;
  esac
  shift
done
# shellcheck source=SCRIPTDIR/env.sh
source "$HERE/env.sh"

if [[ -n $folder ]]; then
  [[ -n $workdir ]] || die "--fetch needs the --workdir of the run" 2
  run mkdir -p "$folder"
  case $workdir in
    /*) run "${SCP[@]}" --recurse "$TPU_NAME:$workdir/profile" "$folder" --worker=0 ;;
    *) run "${SCP[@]}" --recurse "$TPU_NAME:mmdiff/$workdir/profile" "$folder" --worker=0 ;;
  esac
else
  [[ $steps =~ ^[0-9]+:[0-9]+$ ]] || die "--steps '$steps': give the first and the last step, for example --steps 20:25" 2
  (($# > 1)) || die "give the training command after --; see profile.sh --help" 2
  shift
  "$HERE/run.sh" --xla "$xla" -- "$@" --profile "$steps"
fi

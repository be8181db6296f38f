#!/usr/bin/env bash
# Run a command on the GPUs of this machine: one process for all of them.
set -euo pipefail

HELP='usage: gpu_local.sh [--gpus LIST] [--xla SET] [--dry-run] -- COMMAND...

  --gpus LIST   use only these, for example 0,1 (default: all)
  --xla SET     compiler flags from xla_flags.txt for h100 (default: none); they follow those in XLA_FLAGS
  --dry-run     print the command, do not run it

Ends with the exit code of COMMAND.

example: tpu_scripts/gpu_local.sh --xla overlap -- mmdiff train experiments/quickstart.py --workdir runs/quickstart'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment=() xla=none
while (($#)); do
  case $1 in
    --gpus) need_value "$@" && environment+=(CUDA_VISIBLE_DEVICES="$2") && shift ;;
    --xla) need_value "$@" && xla=$2 && shift ;;
    --) break ;;
    *) option "$1" ;;
  esac
  shift
done
(($# > 1)) || die "give the command after --; see gpu_local.sh --help" 2
shift
flags=$("$HERE/xla_flags.sh" h100 "$xla")
[[ -z $flags ]] || environment+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }${flags#XLA_FLAGS=}")
((${#environment[@]} == 0)) || set -- env "${environment[@]}" "$@"
say "$(quoted "$@")"
run "$@"

#!/usr/bin/env bash
# Look compiler flags up in xla_flags.txt.
set -euo pipefail

HELP='usage: xla_flags.sh GENERATION SET[,SET...]
       xla_flags.sh --list

Prints NAME=VALUE for each environment variable to be set. GENERATION: v4, v5e, v5p, v6e, tpu7x, h100. The set "none" prints
nothing and is the default of every script; --list prints what there is. Only reads; --dry-run changes nothing.

example: tpu_scripts/xla_flags.sh v6e overlap,vmem'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

table=$HERE/xla_flags.txt list=0 words=()
while (($#)); do
  case $1 in
    --list) list=1 ;;
    -*) option "$1" ;;
    *) words+=("$1") ;;
  esac
  shift
done
if ((list)); then
  grep -v '^#' "$table"
  exit 0
fi
((${#words[@]} == 2)) || die "give a generation and a set; see xla_flags.sh --help" 2
generation=${words[0]}
IFS=, read -ra sets <<<"${words[1]}"

declare -A flags=()
for set in "${sets[@]}"; do
  [[ $set != none ]] || continue
  found=0
  while read -r generations name variable flag; do
    [[ $name == "$set" && ,$generations, == *,$generation,* ]] || continue
    found=1 flags[$variable]+="${flags[$variable]:+ }$flag"
  done < <(grep -v '^#' "$table")
  ((found)) || die "xla_flags.txt has no set '$set' for '$generation'; see xla_flags.sh --list" 2
done
for variable in "${!flags[@]}"; do
  echo "$variable=${flags[$variable]}"
done

#!/usr/bin/env bash
# Send the committed code to all hosts of the TPU.
set -euo pipefail

HELP='usage: sync.sh [--commit COMMIT | --dirty] [--dry-run]

Sends the code to ~/mmdiff on all hosts of TPU_NAME. The file COMMIT there names what was sent. Files sent before are
replaced or removed; anything else in ~/mmdiff stays. Refused while a job runs there, and if the working tree has changes.

  --commit COMMIT   send this commit (default: HEAD)
  --dirty           send HEAD with the uncommitted changes of tracked files; COMMIT then ends in -dirty
  --dry-run         print the commands, run none of them

example: tpu_scripts/sync.sh'
# shellcheck source=SCRIPTDIR/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

commit="" dirty=0
while (($#)); do
  case $1 in
    --commit) need_value "$@" && commit=$2 && shift ;;
    --dirty) dirty=1 ;;
    *) option "$1" ;;
  esac
  shift
done
[[ -z $commit ]] || ((!dirty)) || die "--commit and --dirty exclude each other" 2
# shellcheck source=SCRIPTDIR/env.sh
source "$HERE/env.sh"

cd "$HERE/.."
if [[ -z $commit ]] && ((!dirty)) && [[ -n $(git status --porcelain) ]]; then
  die "the working tree has changes: commit them, or send HEAD with --commit HEAD, or the changes with --dirty" 2
fi
tree=$(git rev-parse --verify --quiet "${commit:-HEAD}^{commit}") || die "no commit '$commit'" 2
name=$tree
if ((dirty)); then
  changes=$(git -c user.name=mmdiff -c user.email=mmdiff@localhost stash create) # an object only: nothing is stashed away
  tree=${changes:-$tree} name=$name-dirty
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo "$name" >"$folder/COMMIT"
run git archive --format=tar.gz --output="$folder/mmdiff.tar.gz" --add-file="$folder/COMMIT" "$tree"
run "${SCP[@]}" "$folder/mmdiff.tar.gz" "$TPU_NAME:mmdiff.tar.gz" --worker=all
# .sent lists what the last sync brought: those files go, so that a module removed from the code is removed there too
# shellcheck disable=SC2016
run "${SSH[@]}" --worker=all --command='set -e
mkdir -p mmdiff && cd mmdiff
job=tpu_scripts/worker/job.sh
if [ -e $job ] && bash $job state | grep -q running; then echo "a job runs here: stop.sh first" >&2; exit 1; fi
if [ -e .sent ]; then xargs -d "\n" rm -f -- <.sent; fi
tar --list --quoting-style=literal --gzip --file ../mmdiff.tar.gz | grep -v "/$" >.sent
tar --extract --gzip --file ../mmdiff.tar.gz'
((DRY_RUN)) || say "sent $name to $TPU_NAME"

#!/usr/bin/env bash
# Run a command and write down how it ended.
set -euo pipefail

HELP='usage: record.sh [--dry-run] PREFIX COMMAND...

Runs COMMAND. PREFIX.pid holds its process id, and PREFIX.exit its exit code once it has ended; ends with that code.

example: record.sh job mmdiff train experiments/quickstart.py --workdir runs/one'
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

while [[ ${1:-} == -* ]]; do
  option "$1"
  shift
done
(($# > 1)) || die "give a prefix and a command; see record.sh --help" 2
prefix=$1
shift
((!DRY_RUN)) || { run "$@" && exit 0; }

trap : TERM # a signal to all processes must not end this shell before the command has saved and ended
code=0
# shellcheck disable=SC2016
bash -c 'echo $$ >"$0.pid" && exec "$@"' "$prefix" "$@" || code=$?
echo "$code" >"$prefix.exit.new"
mv "$prefix.exit.new" "$prefix.exit" # in one step: nobody reads half a code
exit "$code"

#!/usr/bin/env bash
# On a host of the TPU: install uv, Python and the project. Called by setup.sh.
set -euo pipefail

HELP='usage: install.sh [--dry-run]

Installs uv, Python 3.12 and the project with its TPU libraries into ~/mmdiff/.venv. A stamp there remembers what was
installed: repeated, it does nothing until setup.py or tpu_scripts/constraints.txt changes. If constraints.txt exists, the
versions in it are the ones installed, on every host and every time; to make it:
uv pip compile setup.py --extra tpu --python-version 3.12 --output-file tpu_scripts/constraints.txt

  --dry-run   print the commands, run none of them

example: bash mmdiff/tpu_scripts/worker/install.sh'
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

while (($#)); do
  option "$1"
  shift
done

cd "$HERE/.."
constraints=()
[[ ! -e tpu_scripts/constraints.txt ]] || constraints=(--constraints tpu_scripts/constraints.txt)
stamp=.venv/.installed
wanted=$(cat setup.py tpu_scripts/worker/install.sh "${constraints[@]:1}" | sha256sum)
if [[ -e $stamp && $(<"$stamp") == "$wanted" ]]; then
  say "installed already"
  exit 0
fi

export PATH=$HOME/.local/bin:$PATH
if ! command -v uv >/dev/null; then
  retry bash -c 'set -o pipefail && curl --fail --silent --show-error --location https://astral.sh/uv/install.sh | sh'
fi
[[ -x .venv/bin/python ]] || retry uv venv --quiet --python 3.12 .venv
retry uv pip install --quiet --python .venv/bin/python "${constraints[@]}" --editable '.[tpu]'
((DRY_RUN)) || echo "$wanted" >"$stamp"

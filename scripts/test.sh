#!/usr/bin/env bash
# bash scripts/test.sh [--oldest] [PYTEST ARGUMENTS]: the environment with the test tools, then ruff, mypy and pytest.
# --oldest: the same with the oldest supported versions, in an environment of its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

venv=.venv constraints=constraints.txt
if [[ "${1:-}" == --oldest ]]; then
    shift
    venv=.venv-oldest constraints=constraints-oldest.txt
fi
setup_env "$venv" "[test]" "$constraints" pytest hypothesis ruff mypy peft
cd "$root"
"$python" -m ruff check . || die "ruff found what is listed above: 'ruff check --fix .' repairs most of it."
"$python" -m ruff format --check . || die "the files above are not formatted: run 'ruff format .'."
"$python" -m mypy loralib || die "mypy found the type errors listed above."
exec "$python" -m pytest "$@"

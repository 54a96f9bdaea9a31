#!/usr/bin/env bash
# bash scripts/test.sh [--oldest | --newest] [PYTEST ARGUMENTS]: runs ruff, mypy and pytest in an environment with the test
# tools. The default tier runs in one process for each core, 4 at most; -n 0 makes it one process, for --pdb and -s.
# --oldest: pytest with the oldest supported versions, in an environment of its own. Its torch comes with CUDA's libraries,
#   5 GB on disk in all, so run it by hand: before a release, and when a lower end in setup.py changes.
# --newest: pytest with the newest versions that setup.py allows. This environment is made again at each call and is as
#   large. Run it by hand when torch or transformers have a new version.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

venv=.venv constraints=constraints.txt
case "${1:-}" in
    --oldest) shift; venv=.venv-oldest constraints=constraints-oldest.txt ;;
    --newest)
        shift
        venv=.venv-newest constraints=/dev/null
        rm -rf "${root:?}/$venv" # pip would not upgrade installed packages
        ;;
esac
setup_env "$venv" "[test]" "$constraints" pytest xdist hypothesis ruff mypy peft trl
cd "$root"
if [[ "$venv" == .venv ]]; then
    "$python" -m ruff check . || die "ruff found what is listed above: 'ruff check --fix .' repairs most of it."
    "$python" -m ruff format --check . || die "the files above are not formatted: run 'ruff format .'."
    "$python" -m mypy loralib || die "mypy found the type errors listed above."
fi
# Tests of one file share what they have trained. The other tiers measure or kill, so nothing may run beside them.
[[ " $*" == *" -m"* ]] || set -- -n logical --maxprocesses 4 --dist loadfile "$@"
exec "$python" -m pytest "$@"

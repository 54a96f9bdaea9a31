# Sourced by other scripts. Finds or makes the Python environment in which they run, and sets `python` to it.
# It installs packages only into environments inside of the clone.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() {
    echo "error: $*" >&2
    exit 1
}

# recent PYTHON: whether it is 3.11 or later, which the libraries need.
recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# installed PYTHON MODULE...: whether this clone's loralib is installed there, and the modules too.
installed() {
    "$1" -P -c '
import importlib.metadata, importlib.util, os, sys
importlib.metadata.version("rm-lora-glue")
root, *modules = sys.argv[1:]
found = importlib.util.find_spec("loralib").origin
sys.exit(not (os.path.samefile(os.path.dirname(os.path.dirname(found)), root) and all(map(importlib.util.find_spec, modules))))
' "$root" torch transformers datasets "${@:2}" 2>/dev/null
}

# setup_env VENV EXTRAS CONSTRAINTS [MODULE...]: uses the active environment if this clone and the modules are installed
# there. Otherwise it uses the environment VENV. If VENV does not exist, it makes VENV and installs this clone there with
# EXTRAS, at the versions of CONSTRAINTS.
setup_env() {
    local venv="$root/$1" extras="$2" constraints="$3" candidate base="" stamp
    if [[ "$1" == .venv ]] && candidate="$(command -v python)" && installed "$candidate" "${@:4}"; then
        python="$candidate"
        return
    fi
    unset PYTHONPATH PYTHONHOME
    python="$venv/bin/python"
    # The stamp tells from which files and where the packages were installed. If it changes, they are installed again.
    stamp="$(cd "$root" && cat setup.py "$constraints" | cksum) $root"
    if recent "$python" && [[ "$(cat "$venv/installed$extras" 2>/dev/null)" == "$stamp" ]]; then
        return
    fi
    for candidate in python3.11 python3 python python3.12 python3.13; do
        if recent "$candidate"; then
            base="$candidate"
            break
        fi
    done
    [[ -n "$base" ]] || die "Python 3.11 or later is needed and none was found ($(python3 --version 2>&1 || true)):" \
        "install one, or run 'conda env create -f env.yml' and 'conda activate py39', then run this again."
    if ! recent "$python" || [[ "$(cat "$venv/place" 2>/dev/null)" != "$root" ]]; then
        echo "Making $venv with $("$base" --version) ..."
        "$base" -m venv --clear "$venv" ||
            die "$base could not make the environment $venv: on Debian and Ubuntu install the package python3-venv."
        echo "$root" >"$venv/place" # an environment does not survive a move of its folder
    fi
    echo "Installing the versions of $constraints into $venv (some minutes, once) ..."
    rm -f "$venv"/installed*
    (cd "$root" && "$python" -m pip install -qq --disable-pip-version-check -c "$constraints" -e ".$extras") ||
        die "the installation failed, see pip's message above: when it is solved, run this again."
    echo "$stamp" >"$venv/installed$extras"
    [[ "$extras" == "" ]] || echo "$stamp" >"$venv/installed" # the quickstart can use an environment for the tests
}

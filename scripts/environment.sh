#!/bin/sh
# Makes .venv when it is missing or broken and installs one extra of pyproject.toml into it, with constraints.txt.
# Run from the root of the repository: sh scripts/environment.sh demo|dev|dev-docs|bench
#
# A stamp per extra, written last, says what was installed: while it holds, nothing is installed again. A marker stands
# in .venv while something is being installed: an installation that was killed leaves it, and the next run rebuilds.
set -eu

extra=$1
python=${PYTHON:-python3}
venv=.venv
marker=$venv/installing

stop() {
    printf '%s\n' "$*" >&2
    exit 1
}

# Prints what an installation depends on; fails if the interpreter or its pip is broken or too old.
key() {
    "$venv/bin/python" -I - <<'END' 2>/dev/null
import hashlib, importlib.util, os, pathlib, sys
if sys.version_info < (3, 10) or importlib.util.find_spec("pip") is None:
    raise SystemExit(1)
files = [pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "scripts/environment.sh")]
parts = [sys.version.encode(), os.getcwd().encode(), *files]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
END
}

# An extra is there when it, or one that contains it, was installed last with this key.
installed() {
    case $extra in
        demo) extras="demo dev bench" ;;
        dev) extras="dev bench" ;;
        *) extras=$extra ;;
    esac
    for name in $extras; do
        if [ "$(cat "$venv/installed-$name" 2>/dev/null)" = "$1" ]; then return 0; fi
    done
    return 1
}

create() {
    "$python" -c '' 2>/dev/null || stop "Expected a Python interpreter, got PYTHON=$python, which does not run." \
        "Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3 ..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || stop "Expected Python 3.10 or newer," \
        "got PYTHON=$python, which is $("$python" -V 2>&1). Install a newer one, or name it: make PYTHON=python3.12 ..."
    "$python" -c 'import ensurepip, venv' 2>/dev/null || stop "Expected a Python that can make environments," \
        "got PYTHON=$python without venv or ensurepip. On Debian and Ubuntu: apt install python3-venv"
    echo "Making .venv with $("$python" -V 2>&1)"
    rm -rf "$venv"
    mkdir "$venv"
    : > "$marker"
    "$python" -m venv "$venv"
}

# Exit code 1 without a signal is pip's own "no", which it rolls back. After anything else the marker stays.
interrupted=0
trap 'interrupted=1' HUP INT TERM
pip_install() {
    code=0
    "$venv/bin/python" -m pip install --disable-pip-version-check $quiet "$@" || code=$?
    [ "$interrupted" -eq 0 ] || stop "Interrupted. The next run makes .venv anew."
    if [ "$code" -eq 1 ]; then
        rm -f "$marker"
        stop "The installation was refused, see above. Nothing else was changed; run the command again when it is cured."
    fi
    return "$code"
}

install() {
    echo "Installing aidefend[$extra] into .venv; the first time this takes minutes and up to some GB"
    : > "$marker"
    pip_install "pip>=22"
    pip_install --constraint constraints.txt --editable ".[$extra]"
    if [ "$extra" = bench ]; then
        # Peers whose own requirements cannot be met beside the others; benchmarks/peers.txt says why.
        PIP_CONSTRAINT=benchmarks/peers-build.txt pip_install --no-deps --requirement benchmarks/peers.txt
    fi
}

[ -t 1 ] && quiet="" || quiet="--quiet"
if [ ! -e "$marker" ] && now=$(key) && installed "$now"; then exit 0; fi

# One installation at a time, where the system can lock: a second `make` waits here and then finds the stamp.
if command -v flock >/dev/null 2>&1; then
    exec 9>.venv.lock
    flock 9
fi
if [ -e "$marker" ]; then
    echo "The last installation into .venv was cut short; making it anew"
    create
elif ! key >/dev/null; then
    create
fi
if installed "$(key)"; then exit 0; fi
install
key > "$venv/stamp.new"
mv "$venv/stamp.new" "$venv/installed-$extra"
rm -f "$marker"

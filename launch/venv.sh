# Sourced by the other scripts:  source launch/venv.sh EXTRAS
# Creates .venv in the repository if it does not exist, installs the package with the given extras, and activates it.
# A torch that is in .venv already is kept. Otherwise it installs the release that the tests run with, which need not be
# the newest that setup.py allows; TORCH names another, as in TORCH=torch==2.15.0.
PYTHON=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
    "$PYTHON" -m venv .venv
fi
source .venv/bin/activate
stamp=.venv/installed-${1:-runtime}
if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
    echo "installing the package${1:+ with the extras $1} into .venv ..."
    torch=${TORCH:-}
    [ -n "$torch" ] || python -m pip show --quiet torch 2> /dev/null || torch="torch==2.13.*"
    python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}" ${torch:+"$torch"}
    touch "$stamp"
fi

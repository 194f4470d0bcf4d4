# Sourced by the other scripts:  source launch/venv.sh EXTRAS
# Creates .venv in the repository if it does not exist, installs the package with the given extras, and activates it.
PYTHON=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
    "$PYTHON" -m venv .venv
fi
source .venv/bin/activate
stamp=.venv/installed-${1:-runtime}
if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
    echo "installing the package${1:+ with the extras $1} into .venv ..."
    python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
    touch "$stamp"
fi

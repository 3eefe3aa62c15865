#!/bin/sh
# Makes .venv beside this file and installs jaxpeft into it. Needs Python >= 3.11 and nothing else: no root, no pip.
#   sh install.sh            the library and its command
#   sh install.sh test       with what the tests need (any extras of pyproject.toml may be named)
set -eu
cd "$(dirname "$0")"

python=""
for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
  [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "install.sh: no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python sh install.sh" >&2
  exit 1
fi

if [ ! -x .venv/bin/pip ]; then
  rm -rf .venv
  if ! "$python" -m venv .venv 2>/dev/null; then
    # Debian and Ubuntu keep ensurepip in a package of its own. Its wheel of pip can be fetched and read without root.
    rm -rf .venv
    "$python" -m venv --without-pip .venv
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && apt-get download -q python3-pip-whl && dpkg-deb -x python3-pip-whl_*.deb .) || {
      echo "install.sh: this Python has no pip, and python3-pip-whl could not be fetched; install python3-venv" >&2
      exit 1
    }
    wheel=$(find "$work" -name 'pip-*.whl' | head -n 1)
    .venv/bin/python "$wheel/pip" install -q --no-index --find-links "$(dirname "$wheel")" pip
  fi
fi
.venv/bin/python -m pip install -q --disable-pip-version-check --upgrade pip
.venv/bin/python -m pip install -q --disable-pip-version-check -e ".${1:+[$1]}"

#!/usr/bin/env bash
# Set up what d2kd needs, idempotently: a virtual environment with torch, detectron2 and d2kd itself.
#   PYTHON      interpreter that makes the environment       (default python3)
#   VENV        its folder; "system" checks and uses PYTHON's own packages instead (default .venv)
#   DETECTRON2  "registry" (default) or "official": detectron2 from its own repository
# The marker is written last: an interrupted run is simply continued by the next one.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv} DETECTRON2=${DETECTRON2:-registry}
official="git+https://github.com/facebookresearch/detectron2.git"

fail() { echo "setup: $*" >&2; exit 1; }

case "$DETECTRON2" in
  registry | official) ;;
  *) fail "DETECTRON2=$DETECTRON2 is not known; use registry or official" ;;
esac
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null ||
  fail "PYTHON=$PYTHON is no Python of at least 3.9; name one with: make setup PYTHON=/path/to/python3"

if [ "$VENV" = system ]; then
  for module in torch torchvision detectron2 cv2 matplotlib tensorboard safetensors pytest ruff mypy; do
    "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" ||
      fail "VENV=system: $PYTHON has no $module; install it there (see requirements/), or leave VENV out to make .venv"
  done
  exit 0
fi

marker="$VENV/.d2kd-ready"
want="$DETECTRON2 $(cat requirements/*.txt setup.py scripts/setup.sh | sha256sum | cut -d' ' -f1) $PWD"
[ -f "$marker" ] && [ "$(cat "$marker")" = "$want" ] && exit 0

python="$VENV/bin/python"
if ! "$python" -m pip --version >/dev/null 2>&1; then
  [ ! -e "$VENV" ] || [ -f "$VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$VENV")" ] ||
    fail "$VENV is there and is no virtual environment; remove it or choose another VENV"
  echo "setup: making $VENV"
  "$PYTHON" -m venv --clear "$VENV" ||
    fail "$PYTHON could not make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
fi
rm -f "$marker"
echo "setup: installing torch and the other packages into $VENV (several GB the first time)"
"$python" -m pip install --quiet uv
# uv is quick and hard-links from its cache; pip is the way out where uv cannot reach the index pip is set up for.
"$python" -m uv pip install --quiet --python "$python" -r requirements/runtime.txt -r requirements/dev.txt ||
  "$python" -m pip install -r requirements/runtime.txt -r requirements/dev.txt
echo "setup: installing detectron2 ($DETECTRON2)"
purelib=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
if [ "$DETECTRON2" = official ]; then
  "$python" -m pip install --quiet --no-build-isolation --no-deps "$official"
else
  "$python" -m pip install --quiet --upgrade --no-deps --only-binary=:all: --python-version 3.10 \
    --require-hashes --target "$purelib" -r requirements/detectron2.txt
fi
"$python" -m pip install --quiet --no-deps --no-build-isolation -e .
echo "$want" >"$marker"
echo "setup: ready in $VENV"

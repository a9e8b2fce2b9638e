#!/usr/bin/env bash
# Set up what d2kd needs: a virtual environment with torch, detectron2 and d2kd itself. Running it again is safe.
#   PYTHON      interpreter that makes the environment       (default python3)
#   VENV        its folder; "system" checks and uses PYTHON's own packages instead (default .venv)
#   DETECTRON2  which detectron2 to install; a different one is uninstalled first:
#                 registry     the build of the package registry, without compiled operators
#                 official     detectron2's own repository; needs git and a C++ compiler
#                 a path or URL of a source checkout, an sdist or a wheel of detectron2
#               By default what is installed stays, and an environment without detectron2 gets "registry".
# The marker is written last, so the next run continues an interrupted one.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv} DETECTRON2=${DETECTRON2:-}

fail() { echo "setup: $*" >&2; exit 1; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null ||
  fail "PYTHON=$PYTHON is not Python 3.9 or newer; name one with: make setup PYTHON=/path/to/python3"

registry=$(grep -o '^sal-detectron2==[^ ]*' requirements/detectron2.txt)
case "$DETECTRON2" in
  "") want="" ;;
  registry) want=$registry ;;
  official) want="git+https://github.com/facebookresearch/detectron2.git" ;;
  *://*) want=$DETECTRON2 ;;
  *)
    [ -f "$DETECTRON2" ] || [ -f "$DETECTRON2/detectron2/__init__.py" ] ||
      fail "DETECTRON2=$DETECTRON2 is not known; use registry, official, or the path or URL of a checkout of detectron2"
    want=$("$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$DETECTRON2")
    ;;
esac

if [ "$VENV" = system ]; then
  [ -z "$DETECTRON2" ] || fail "VENV=system installs nothing; leave DETECTRON2 out, or leave VENV out to make .venv"
  for module in torch torchvision detectron2 cv2 matplotlib tensorboard safetensors onnx onnxruntime \
    pytest hypothesis ruff mypy; do
    "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" ||
      fail "VENV=system: $PYTHON has no $module; install it there (see requirements/), or leave VENV out to make .venv"
  done
  exit 0
fi

python="$VENV/bin/python"
marker="$VENV/.d2kd-ready"     # what the other packages were installed for
source="$VENV/.d2kd-detectron2" # where a detectron2 built from source came from
stamp="$(cat requirements/*.txt setup.py scripts/setup.sh | sha256sum | cut -d' ' -f1) $PWD"
ready() { [ "$(cat "$marker" 2>/dev/null)" = "$stamp" ]; }

if ! ready && ! "$python" -m pip --version >/dev/null 2>&1; then
  [ ! -e "$VENV" ] || [ -f "$VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$VENV")" ] ||
    fail "$VENV exists and is not a virtual environment; remove it or choose another VENV"
  echo "setup: making $VENV"
  "$PYTHON" -m venv --clear "$VENV" ||
    fail "$PYTHON could not make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
fi

# The registry's distribution is called sal-detectron2; all others are called detectron2.
distributions=$("$python" -I -c '
from importlib.metadata import distributions
found = {(d.metadata["Name"] or "").lower(): d.version for d in distributions()}
print(*(f"{name}=={found[name]}" for name in ("detectron2", "sal-detectron2") if name in found))
') || fail "$python does not run; remove $VENV and repeat"
case "$distributions" in
  *" "*) have="two builds that overwrote each other" ;; # made by older versions of this script
  detectron2==*) have=$(cat "$source" 2>/dev/null || echo "$distributions") ;;
  *) have=$distributions ;;
esac
if [ -z "$want" ]; then
  case "$distributions" in
    *" "* | "" | sal-detectron2==*) want=$registry ;;
    *) want=$have ;;
  esac
fi
ready && [ "$have" = "$want" ] && exit 0

if ! ready; then
  rm -f "$marker"
  echo "setup: installing torch and the other packages into $VENV (several GB the first time)"
  "$python" -m pip install --quiet uv
  # uv is quick and hard-links from its cache; pip is the fallback where uv cannot reach the index pip is set up for.
  # Without bytecode, which only pip compiles by default, every process takes twice as long to import torch.
  packages="-r requirements/runtime.txt -r requirements/timm.txt -r requirements/dev.txt"
  "$python" -m uv pip install --quiet --compile-bytecode --python "$python" $packages || "$python" -m pip install $packages
fi

if [ "$have" != "$want" ]; then
  # Get the new build before the old one is removed: a download or compilation that fails changes nothing.
  wheels=$(mktemp -d)
  trap 'rm -rf "$wheels"' EXIT
  echo "setup: installing detectron2 ($want)"
  if [ "$want" = "$registry" ]; then
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.10 --require-hashes \
      --dest "$wheels" -r requirements/detectron2.txt
  else
    echo "setup: compiling takes a few minutes; it is faster where ninja is installed"
    "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$wheels" "$want" ||
      fail "could not build detectron2 from $want, see above; it needs a C++ compiler (on Debian and Ubuntu:" \
        "apt-get install g++), and git for a git+https URL. DETECTRON2=registry needs neither. $VENV keeps what it had"
    [ -f "$wheels"/detectron2-*.whl ] || fail "$want is not detectron2, but $(ls "$wheels")"
  fi
  for distribution in $distributions; do
    "$python" -m pip uninstall --quiet --yes "${distribution%%==*}"
  done
  rm -f "$source"
  if [ "$want" = "$registry" ]; then
    "$python" -m pip install --quiet --no-deps --only-binary=:all: --python-version 3.10 \
      --target "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" "$wheels"/*.whl
  else
    "$python" -m pip install --quiet --no-deps "$wheels"/*.whl
    echo "$want" >"$source"
  fi
fi

# The registry's wheel says that it fits Python 3.10 and numpy 1 only. Neither holds for what d2kd uses (see
# requirements/detectron2.txt), and pip check would complain.
for info in "$VENV"/lib/python*/site-packages/sal_detectron2-*.dist-info; do
  [ -d "$info" ] || continue
  sed -i.old 's/^Tag: .*/Tag: py3-none-any/' "$info/WHEEL"
  sed -i.old 's/^Requires-Dist: numpy<2$/Requires-Dist: numpy/' "$info/METADATA"
  rm -f "$info"/*.old
done

"$python" -m pip install --quiet --no-deps --no-build-isolation -e .
echo "$stamp" >"$marker"
echo "setup: ready in $VENV"

#!/bin/sh
# Runs the tests with every version that is promised: with the oldest of jax and of all that
# pyproject.toml gives a minimum for, and with the newest that each Python can have. Each has an
# environment of its own, .venv-*.
#
#   tests/matrix.sh         the whole suite, on every Python that is found
#   tests/matrix.sh brief   a chosen part, of about a minute, on the oldest and the newest
#
# A Python that is not installed is skipped, and it is said. That nothing ran is an error.
set -eu
cd "$(dirname "$0")/.."
make=${MAKE:-make}
brief="tests/core/test_tree.py tests/model/test_model.py tests/nn/test_layer.py tests/io/test_formats.py
  tests/inspect/test_plan.py tests/inspect/test_show.py
  tests/nn/test_attention.py::test_every_option_is_the_plain_formula[window]"
ran="" skipped=""

find_python() { # version: prints the command of a Python that starts
  for found in "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python "${PYTHON:-python3}"; do
    if [ "$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
      echo "$found"
      return
    fi
  done
}

minima() { # python: prints the oldest of each package, "jax==0.8.1 jaxlib==0.8.1 ..."
  "$1" - <<'END'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
wanted = project["dependencies"] + [one for extra in extras.values() for one in extra]
print(*[one.replace(">=", "==") for one in wanted if ">=" in one])
END
}

run() { # name, python, packages
  echo "== $1: $3"
  if [ "$part" = brief ]; then
    "$make" --no-print-directory test VENV=".venv-$1" PYTHON="$2" JAX="$3" TESTS="$(echo $brief)"
  else
    "$make" --no-print-directory test VENV=".venv-$1" PYTHON="$2" JAX="$3"
  fi
  ran="$ran $1"
}

part=${1:-whole}
python=$(find_python 3.11)
if [ -n "$python" ]; then
  run 3.11-oldest "$python" "$(minima "$python")"
else
  skipped="$skipped 3.11-oldest"
fi
newest=""
for version in 3.11 3.12 3.13 3.14; do
  python=$(find_python $version)
  # 3.14 is not promised yet: it counts once there is a Python, and a jaxlib for it.
  if [ -z "$python" ] || { [ $version = 3.14 ] && ! "$python" -m pip install --quiet --dry-run \
    --ignore-installed --no-deps --only-binary :all: jaxlib 2>/dev/null; }; then
    skipped="$skipped $version"
  elif [ "$part" = brief ]; then
    newest=$version
  else
    run $version "$python" jax
  fi
done
if [ -n "$newest" ]; then
  run "$newest" "$(find_python "$newest")" jax
fi
echo "passed:${ran:- nothing}; skipped, as there is no such Python or no jaxlib for it:${skipped:- nothing}"
[ -n "$ran" ]

#!/bin/sh
# Runs the tests with the oldest jax that is supported, and with the newest that each Python can take.
set -eu
oldest=0.7.0
ran=0
run() { # name, python, jax
  echo "== $1"
  make test VENV=".venv-$1" PYTHON="$2" JAX="$3" WORKERS="${WORKERS:-2}"
  ran=$((ran + 1))
}
for version in 3.11 3.12 3.13; do
  for python in "python$version" "$HOME"/.pyenv/versions/"$version".*/bin/python; do
    if "$python" -c 'import sys' 2>/dev/null; then
      if [ "$version" = 3.11 ]; then
        run "$version-oldest" "$python" "jax==$oldest jaxlib==$oldest"
      fi
      run "$version" "$python" jax
      break
    fi
  done
done
echo "$ran passed, 0 failed"
[ "$ran" -gt 0 ]

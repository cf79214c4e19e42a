#!/usr/bin/env bash
# bash tests/run.sh        lint, types, tests: at most 10 minutes on 2 cores
# bash tests/run.sh all    the slow tests too (fresh install, quickstart, wheel on
#                          every supported Python found): at most 50 minutes
# Arguments after these go to pytest: bash tests/run.sh -k layering
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=(dev)
selection=(-m "not slow")
if [ "${1:-}" = all ]; then
  shift
  extras=(dev parity browser)
  selection=()
  # A scheduler to run launch/slurm/ in and a browser for launch/demo.py, where that is
  # a matter of asking for them; tests of what cannot be had say so and are skipped.
  packages=()
  command -v sbatch >/dev/null || packages+=(slurm-wlm munge)
  command -v chromium google-chrome >/dev/null || packages+=(chromium)
  if [ ${#packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    printf '\n== apt-get install %s\n' "${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends \
      "${packages[@]}"; } >/dev/null || echo "could not be installed"
  fi
fi

failed=()
step() {
  printf '\n== %s\n' "$*"
  "$@" || failed+=("$*")
}

bash launch/setup.sh "${extras[@]}" || exit 1
PATH="$PWD/.venv/bin:$PATH"
sources=(cm3leon_jax tests)
for folder in configs launch notebooks; do
  [ -d "$folder" ] && sources+=("$folder")
done
step ruff check "${sources[@]}"
step ruff format --check "${sources[@]}"
step pyright
# One process per core, each file whole in one of them: what its tests share is made once.
step python -m pytest --numprocesses auto --dist loadfile ${selection[@]+"${selection[@]}"} "$@"

# Compilers of hardware that is not here, apart (1.1 GB): with them installed every start
# of jax would be slower, and would look for that hardware. Where they cannot be had their
# tests say so and are skipped.
if [ ${#selection[@]} -eq 0 ]; then
  printf '\n== compilers of TPUs and GPUs, into .venv-plan\n'
  apart=.venv-plan/bin/python
  [ -x "$apart" ] || python -m venv .venv-plan
  of_site='import site; print(site.getsitepackages()[0])'
  python -c "$of_site" >"$("$apart" -c "$of_site")/base.pth"
  compilers="$(python - <<'END'
from importlib.metadata import requires, version
print(*(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))
print(*(f"jax-cuda13-{part}=={version('jax')}" for part in ("plugin", "pjrt")))
END
)"
  "$apart" -m pip install --quiet --disable-pip-version-check --no-deps $compilers ||
    echo "could not be installed"
  step "$apart" -m pytest --numprocesses auto tests/test_plan_pods.py
fi

# After pytest's summary only when it would mislead: something before it failed.
for name in ${failed[@]+"${failed[@]}"}; do printf 'FAILED: %s\n' "$name"; done
[ ${#failed[@]} -eq 0 ]

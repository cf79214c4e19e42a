#!/usr/bin/env bash
# Makes .venv when there is none and installs this checkout into it, editable:
#
#   bash launch/setup.sh [extra...]        extras: tpu cuda icons parity dev
#
# Uses uv where it is installed, else venv and pip. Extras add up from call to call;
# a call that would change nothing returns at once, so every script here starts with
# one. An existing .venv is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
stamp=.venv/.setup

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

for extra in "$@"; do
  # Only names at the start of a line inside the table of extras count.
  sed -n '/^\[project.optional-dependencies\]/,/^\[tool/p' pyproject.toml |
    grep -q "^$extra = " || fail "pyproject.toml has no extra '$extra'"
done

# Two scripts that start together must not both install. The lock is on this file.
if command -v flock >/dev/null; then exec 9<launch/setup.sh && flock 9; fi

# The stamp: what was installed from, then the extras, one a line. A venv and an
# editable install both stop working when the checkout moves, hence the directory.
source="$(cksum <pyproject.toml) $PWD"
wanted=$(printf '%s\n' "$@" | sed '/^$/d' | sort -u)
if [ -f "$stamp" ]; then
  installed=$(sed 1d "$stamp")
  union=$(printf '%s\n' "$installed" "$wanted" | sed '/^$/d' | sort -u)
  if [ "$(head -n 1 "$stamp")" = "$source" ] && [ "$union" = "$installed" ]; then
    exit 0
  fi
  wanted=$union
fi

start=$SECONDS
if [ ! -x "$python" ]; then
  if command -v uv >/dev/null; then
    say "making .venv with uv"
    uv venv --quiet --python '>=3.11' .venv
  else
    base=
    # Versions that every dependency has wheels for come first.
    for candidate in python3.12 python3.11 python3.13 python3 python; do
      if recent "$candidate"; then base=$candidate; break; fi
    done
    [ -n "$base" ] || fail "no Python >= 3.11 found. Install one (Debian, Ubuntu:" \
      "apt-get install python3 python3-venv; macOS: brew install python@3.12) or" \
      "uv (https://docs.astral.sh/uv), then run this again."
    "$base" -c 'import ensurepip, venv' 2>/dev/null || fail \
      "$base cannot make environments. Install its venv package (Debian, Ubuntu:" \
      "apt-get install python3-venv) or uv (https://docs.astral.sh/uv)."
    say "making .venv with $("$base" --version)"
    "$base" -m venv .venv
  fi
fi
recent "$python" || fail ".venv holds no working Python >= 3.11: remove it (rm -r" \
  ".venv) and run this again."

extras=$(printf '%s' "$wanted" | tr '\n' ,)
package=".${extras:+[$extras]}"
say "installing $package into .venv (about a minute on a first run)"
if command -v uv >/dev/null; then
  uv pip install --quiet --python "$python" --editable "$package"
else
  "$python" -c 'import pip' 2>/dev/null || "$python" -m ensurepip >/dev/null
  "$python" -m pip install --quiet --disable-pip-version-check --editable "$package"
fi
# Only after success: a failed install is tried again next time.
printf '%s\n' "$source" ${wanted:+"$wanted"} >"$stamp"
say "done in $((SECONDS - start)) s"

#!/usr/bin/env bash
# Makes .venv with the tested versions, once; sourced by quickstart.sh and test.sh.
# POSTTRAIN_VENV=DIR puts it elsewhere; PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${POSTTRAIN_VENV:-$ROOT/.venv}"
EXTRAS="${1:-}"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "posttrain needs Python 3.11, 3.12 or 3.13 with the venv module; none was found." >&2
  echo "Install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
  exit 2
}

stamp() { cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt" | cksum; }

if [ "$(cat "$VENV/.posttrain-$EXTRAS" 2>/dev/null || true)" != "$(stamp)" ]; then
  python="$(find_python)"
  echo "Setting up $VENV (once; a few minutes) ..." >&2
  [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
  # torch first and by its exact version, so that nothing else chooses another build
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$ROOT/scripts/constraints.txt")"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c "$ROOT/scripts/constraints.txt" -e "$ROOT${EXTRAS:+[$EXTRAS]}"
  if [ "$EXTRAS" = dev ]; then
    # for the tests; its build needs the torch that is there, and compiles nothing before it is used
    DS_BUILD_OPS=0 "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation \
      -c "$ROOT/scripts/constraints.txt" deepspeed
  fi
  stamp >"$VENV/.posttrain-$EXTRAS"
fi
export VENV ROOT

#!/usr/bin/env bash
# Check posttrain on the GPUs of this machine, and print JSON for a report: what scripts/gpu_check.py says.
#   bash scripts/gpu_check.sh > gpu_check.json
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python
exec "$python" scripts/gpu_check.py "$@"

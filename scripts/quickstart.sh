#!/usr/bin/env bash
# From nothing to a trained, evaluated, exported model and a report, on a laptop, offline after installation.
#   bash scripts/quickstart.sh [key=value ...]        for example: model.path=Qwen/Qwen2.5-0.5B-Instruct
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
cd "$ROOT"
exec "$VENV/bin/posttrain" train configs/rlvr/quickstart.yaml --overwrite "$@"

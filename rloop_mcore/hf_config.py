"""What a Hugging Face folder says of its model in JSON, held to the types that engines ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import read_json

_DTYPES = ("float32", "bfloat16", "float16", "float64")  # torch has more, none of weights that can be trained
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_FLOAT = (lambda value: isinstance(value, float) and math.isfinite(value), "a number with a point, such as 0.02")
_WHOLE = (lambda value: type(value) is int, "a whole number")
_TOKEN = (lambda value: value is None or type(value) is int, "a whole number or null")
_TOKENS = (
    lambda value: value is None or all(type(each) is int for each in (value if isinstance(value, list) else [value])),
    "a whole number, a list of them or null",
)
_DTYPE = (lambda value: value in (None, *_DTYPES), f"one of {', '.join(_DTYPES)}")
# of a config.json: transformers refuses other types, and so does every engine; what a family reads it checks itself
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("rms_norm_eps", "initializer_range"), _FLOAT),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "use_cache", "is_causal"), _FLAG),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "sliding_window"), _TOKEN),
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
    "eos_token_id": _TOKENS,
    "max_window_layers": _WHOLE,
    "hidden_act": (lambda value: isinstance(value, str), "a text such as 'silu'"),
    "auto_map": (lambda value: value is None or isinstance(value, dict), "an object or null"),
    "attention_dropout": (lambda value: type(value) in (int, float), "a number"),
    "layer_types": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value)),
        "a list of texts or null",
    ),
    "model_type": (lambda value: isinstance(value, str), "a text such as 'qwen2'"),
}
_OF_GENERATION = {"eos_token_id": _TOKENS, "bos_token_id": _TOKEN, "pad_token_id": _TOKEN}
# by family, what transformers finds no value for where it is null
_NOT_NULL = {
    "head_dim": ("qwen2", "qwen3", "qwen3_moe"),
    "num_key_value_heads": ("mistral", "qwen3_moe"),
    "attention_bias": ("llama", "qwen3", "qwen3_moe"),
    "mlp_bias": ("llama",),
    **dict.fromkeys(("num_experts", "norm_topk_prob", "decoder_sparse_step"), ("qwen3_moe",)),
}


def read_hf_config(folder: Path) -> dict[str, Any]:
    """`config.json` of an HF folder. Raises UserError when there is none, or it is not what engines can read: a JSON
    object with keys of their types; likewise for a generation_config.json beside it, which they read too."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"model.path={folder} holds no config.json: give the folder of a Hugging Face checkpoint, which "
            "`hf download NAME --local-dir FOLDER` makes of one on the hub."
        )
    values = read_json(path)
    _check_types(path, values, _TYPES)
    for key, families in _NOT_NULL.items():
        if values.get("model_type") in families and values.get(key, 0) is None:
            raise UserError(
                f"{path}: {key} is null, which engines don't take for its usual value: write that, or remove the key."
            )
    pad, vocabulary = values.get("pad_token_id"), values.get("vocab_size")
    if pad is not None and type(vocabulary) is int and not -vocabulary <= pad < vocabulary:
        raise UserError(
            f"{path}: pad_token_id is {pad}, and vocab_size {vocabulary}: set it to an id of the vocabulary, or null."
        )
    if (beside := folder / "generation_config.json").exists():
        _check_types(beside, read_json(beside), _OF_GENERATION)
    return values


def _check_types(path: Path, values: Mapping[str, Any], types: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    for key, (fits, words) in types.items():
        if key in values and not fits(values[key]):
            raise UserError(f"{path}: {key} is {values[key]!r:.80}; it has to be {words}.")

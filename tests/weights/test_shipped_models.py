"""The sizes of configs/model, against the parameter counts that the models' publishers give."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rloop_mcore.compose import load_config
from rloop_mcore.config import config_folder
from rloop_mcore.data.countdown_model import CONFIG, random_weights
from rloop_mcore.weights.families import FAMILIES
from rloop_mcore.weights.family import HfConfig

# As the hub's safetensors headers count them ("Model size" on a model's page), tied embeddings once: the folders of
# Qwen3-0.6B (751,632,384) and 1.7B (2,031,739,904) hold a copy of them.
PUBLISHED = {
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_7b": 7_615_616_512,
    "qwen2.5_14b": 14_770_033_664,
    "qwen2.5_32b": 32_763_876_352,
    "qwen2.5_72b": 72_706_203_648,
    "qwen2.5_math_1.5b": 1_543_714_304,
    "qwen2.5_math_7b": 7_615_616_512,
    "qwen2.5_math_72b": 72_706_203_648,
    "qwen3_0.6b": 751_632_384 - 151_936 * 1024,
    "qwen3_1.7b": 2_031_739_904 - 151_936 * 2048,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496,
    "llama3.1_405b": 405_853_388_800,
    "smollm2_135m": 134_515_008,
}
MODELS = sorted(path.stem for path in (config_folder() / "model").glob("*.yaml") if path.stem != "countdown")


def stated(name: str) -> dict[str, object]:
    """What the file says of the model's config.json."""
    config = load_config([f"model={name}", "model.path=m", "run.dir=r", "data.train=d"])
    return {key: value for key, value in vars(config.model.architecture).items() if value is not None}


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_model_has_the_parameters_that_its_publisher_counts(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = stated(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**sizes, pad_token_id=None)  # None: transformers' own may lie outside the vocabulary
        )
    model.tie_weights()  # the first releases of transformers 5 leave it out on meta
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    (family,) = [each for each in FAMILIES if each.name == sizes["model_type"]]
    assert sum(math.prod(shape) for shape in family.shapes(HfConfig(Path(name), sizes)).values()) == PUBLISHED[name]
    first_lines = "".join((config_folder() / "model" / f"{name}.yaml").read_text().splitlines()[:3])
    assert f"{PUBLISHED[name]:,}" in first_lines


def test_the_countdown_model_is_what_is_generated() -> None:
    sizes = stated("countdown")
    assert sizes == {key: CONFIG.get(key, sizes[key]) for key in sizes}
    (family,) = [each for each in FAMILIES if each.name == sizes["model_type"]]
    shapes = family.shapes(HfConfig(Path("countdown"), sizes))
    assert shapes == {name: weight.shape for name, weight in random_weights(seed=0).items()}

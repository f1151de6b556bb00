"""What is told of a component's layers, against the real modules on the meta device."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

from hi_diffusers.families.hidream import published
from hi_diffusers.families.hidream.layers import clip_layers, llama_layers, t5_layers, transformer_layers, vae_layers
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.families.table import PRESETS
from hi_diffusers.weights.layers import Layer

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {
    "text_encoder": published.CLIP_L,
    "text_encoder_2": published.CLIP_G,
    "text_encoder_3": published.T5,
    "text_encoder_4": published.LLAMA,
    "transformer": published.TRANSFORMER,
    "vae": published.VAE,
}
TOLD: dict[str, Callable[[Mapping[str, Any]], list[Layer]]] = {
    "text_encoder": clip_layers,
    "text_encoder_2": clip_layers,
    "text_encoder_3": t5_layers,
    "text_encoder_4": llama_layers,
    "transformer": transformer_layers,
    "vae": vae_layers,
}
BUILT: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "text_encoder": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    "text_encoder_3": lambda config: T5EncoderModel(T5Config(**config)),
    "text_encoder_4": lambda config: LlamaModel(LlamaConfig(**config)),
    "transformer": HiDreamImageTransformer2DModel.from_config,
    "vae": AutoencoderKL.from_config,
}
# The least that each class takes: all else is its own default.
LEAST: dict[str, dict[str, Any]] = {
    "text_encoder": {},
    "text_encoder_3": {"feed_forward_proj": "gated-gelu"},
    "text_encoder_4": {},
    "transformer": {"llama_layers": [0] * 48},
    "vae": {},
}


def real_layers(name: str, config: dict[str, Any]) -> set[Layer]:
    """Of the real module: each parameter once, modules without parameters of their own left out."""
    with torch.device("meta"):
        component = BUILT[name](dict(config))
    if isinstance(component, T5EncoderModel):
        component.tie_weights()
    counted: set[int] = set()
    found = set()
    for path, module in component.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in counted]
        counted.update(id(parameter) for parameter in own)
        if own:
            shapes = tuple(tuple(parameter.shape) for parameter in own)
            found.add(Layer(path, shapes, isinstance(module, nn.Linear)))
    return found


def assert_told(name: str, config: dict[str, Any]) -> None:
    told = TOLD[name](config)
    assert len(set(told)) == len(told)
    assert set(told) == real_layers(name, config)


@pytest.mark.parametrize("name", TOLD)
def test_the_layers_of_a_published_configuration_are_the_modules(name: str) -> None:
    assert_told(name, PUBLISHED[name])


@pytest.mark.parametrize("name", TOLD)
def test_the_layers_of_a_bundled_configuration_are_the_modules(name: str, nano_folder: Path) -> None:
    assert_told(name, json.loads((PRESETS["nano"].folder / name / "config.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", LEAST)
def test_what_a_configuration_leaves_out_is_as_the_class_has_it(name: str) -> None:
    assert_told(name, LEAST[name])


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("text_encoder_3", {"feed_forward_proj": "gated-silu", "d_kv": 32, "relative_attention_num_buckets": 16}),
        ("text_encoder_4", {"attention_bias": True, "mlp_bias": True, "head_dim": 64}),
        ("text_encoder_4", {"head_dim": None, "num_key_value_heads": None}),
        ("transformer", {"num_routed_experts": 0, "out_channels": 8, "caption_channels": [32, 64], "patch_size": 4}),
        ("vae", {"use_quant_conv": True, "use_post_quant_conv": True, "in_channels": 4, "out_channels": 5}),
        ("vae", {"mid_block_add_attention": False, "layers_per_block": 3}),
    ],
)
def test_a_key_that_changes_shapes_changes_the_layers_as_well(name: str, changed: dict[str, Any]) -> None:
    config = PUBLISHED[name] | changed
    assert set(TOLD[name](config)) != set(TOLD[name](PUBLISHED[name]))
    assert_told(name, config)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("text_encoder_3", "feed_forward_proj", "relu"),
        ("text_encoder_3", "is_gated_act", False),
        ("text_encoder_3", "hidden_size", 4096),
        ("vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("vae", "up_block_types", ["UpDecoderBlock2D"] * 3),
    ],
)
def test_a_value_that_is_not_covered_is_refused_by_name(name: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key} must "):
        TOLD[name](PUBLISHED[name] | {key: value})


def test_a_linear_knows_its_widths_and_numbers() -> None:
    (layer,) = (one for one in clip_layers(published.CLIP_L) if one.name.endswith(".0.mlp.fc1"))
    assert (layer.in_features, layer.out_features, layer.num_parameters) == (768, 3072, 768 * 3072 + 3072)


def test_telling_layers_loads_no_large_library() -> None:
    program = (
        "import sys, hi_diffusers.families.hidream.layers\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


@pytest.mark.parametrize("name", TOLD)
def test_the_parameters_names_are_the_modules(name: str) -> None:
    with torch.device("meta"):
        component = BUILT[name](dict(PUBLISHED[name]))
    real = {path: tuple(parameter.shape) for path, parameter in component.named_parameters()}
    assert dict(pair for layer in TOLD[name](PUBLISHED[name]) for pair in layer.named()) == real

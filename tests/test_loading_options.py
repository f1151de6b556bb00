"""What changes a model on loading: files of its own, LoRAs, offloading, tiles, encoders elsewhere."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from cache_functions import resolve
from hi_diffusers import CacheConfig, SamplingOptions, generate, load_pipeline
from hi_diffusers.commands import inference
from hi_diffusers.families.hidream.files import locate
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.metrics import psnr
from hi_diffusers.weights.source import ModelSource, find_folder
from tests.tiny_folder import PROMPT

OPTIONS = SamplingOptions(PROMPT, seed=3, num_steps=12)


def pixels(pipe: HiDreamImagePipeline, **options: Any) -> np.ndarray:
    return generate(pipe, OPTIONS, CacheConfig.off(), **options).pixels


def draw(**loaded: Any) -> np.ndarray:
    return pixels(load_pipeline("nano", device="cpu", **loaded))


@pytest.fixture(scope="module")
def plain(nano_folder: Path) -> np.ndarray:
    return draw()


@pytest.fixture(scope="module")
def weights(nano_folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (nano_folder / "transformer").glob("*.safetensors")
    return load_file(path)


# One file.


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_in_one_file_draws_the_same(
    prefix: str, plain: np.ndarray, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "shared.safetensors"
    save_file({prefix + name: tensor for name, tensor in weights.items()}, path)
    assert np.array_equal(draw(transformer=path), plain)


def test_its_folder_needs_no_weights_of_the_transformer(
    plain: np.ndarray, weights: dict[str, torch.Tensor], nano_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(nano_folder, tmp_path / "model", ignore=shutil.ignore_patterns("calibration"))
    (path,) = (folder / "transformer").glob("*.safetensors")
    path.rename(tmp_path / "shared.safetensors")
    assert np.array_equal(draw(model_path=folder, transformer=tmp_path / "shared.safetensors"), plain)


def write_gguf(path: Path, weights: dict[str, torch.Tensor], kind: str) -> None:
    """As people share them: matrices quantized where their rows divide into blocks, the rest in fp32."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch="hidream")
    quantization = getattr(gguf.GGMLQuantizationType, kind)
    block, _ = gguf.GGML_QUANT_SIZES[quantization]
    for name, tensor in weights.items():
        values = tensor.float().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % block == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("kind", "decibels"), [("Q8_0", 35.0), ("Q4_0", 15.0), ("BF16", 99.0)])
def test_a_gguf_file_draws_nearly_the_same(
    kind: str, decibels: float, plain: np.ndarray, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "shared.gguf"
    write_gguf(path, weights, kind)
    pipe = load_pipeline("nano", device="cpu", transformer=path)
    assert type(pipe.transformer.double_stream_blocks[0].block.attn1.to_q).__name__ == "GGUFLinear"
    drawn = pixels(pipe)
    assert psnr(drawn, plain) > decibels  # the bundled weights are in bf16


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.with_suffix(".gguf").write_bytes(b"nothing"), "is not a GGUF file"),
        (lambda path: path.with_suffix(".safetensors").write_bytes(b"nothing"), "not a complete safetensors file"),
        (lambda path: path.with_suffix(".bin").write_bytes(b"nothing"), "other formats can run code"),
    ],
)
def test_what_is_no_such_file_is_refused(
    write: Callable[[Path], object], message: str, nano_folder: Path, tmp_path: Path
) -> None:
    write(tmp_path / "shared")
    path = next(tmp_path.iterdir(), tmp_path / "shared.safetensors")
    with pytest.raises(ValueError, match=message):
        locate(PRESETS["nano"], ModelSource(transformer=str(path)))


def test_another_models_file_is_refused_before_it_is_read(
    nano_folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file({**weights, "something.weight": torch.zeros(3)}, tmp_path / "more.safetensors")
    save_file(dict(list(weights.items())[1:]), tmp_path / "fewer.safetensors")
    shapes = {name: tensor if tensor.ndim < 2 else tensor[:, :1].contiguous() for name, tensor in weights.items()}
    save_file(shapes, tmp_path / "other.safetensors")
    for name, message in (
        ("more", r"the transformer has no weight something\.weight"),
        ("fewer", r"fewer\.safetensors lacks 1 of the transformer's weights"),
        ("other", r"other\.safetensors is another model's: .* has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            locate(PRESETS["nano"], ModelSource(transformer=str(tmp_path / f"{name}.safetensors")))


# LoRA.


@pytest.fixture(scope="module")
def lora(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of rank 2, on all queries, in diffusers' layout."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in weights.items():
        if name.endswith("attn1.to_q.weight"):
            layer = f"transformer.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=generator) / 8
            tensors[f"{layer}.lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=generator) / 8
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors, path)
    return path


def with_lora(pipe: HiDreamImagePipeline, lora: Path, scale: float) -> HiDreamImagePipeline:
    """The same by hand: W + scale B A."""
    tensors = load_file(lora)
    for name in [name for name in tensors if "lora_A" in name]:
        layer = pipe.transformer.get_submodule(name.removeprefix("transformer.").removesuffix(".lora_A.weight"))
        layer.weight.data += scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    return pipe


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
def test_a_lora_adds_its_product_times_its_scale(plain: np.ndarray, lora: Path, scale: float) -> None:
    drawn = draw(loras=[f"{lora}:{scale}"])
    by_hand = pixels(with_lora(load_pipeline("nano", device="cpu"), lora, scale))
    assert np.abs(drawn - by_hand).max() < 1e-3
    assert psnr(drawn, plain) < 45


def test_text_encoders_that_are_loaded_apart_take_no_lora(lora: Path) -> None:
    encoders = load_pipeline("nano", device="cpu", loras=[str(lora)], parts="encoders")
    assert encoders.encode([PROMPT], 32).t5.shape[0] == 1


def test_a_lora_draws_from_pictures_as_by_hand(lora: Path, nano_folder: Path) -> None:
    """Image-to-image and inpainting."""
    picture, mask = Image.new("RGB", (64, 64), "blue"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    pipe = load_pipeline("nano", device="cpu", loras=[str(lora)])
    by_hand, plain = with_lora(load_pipeline("nano", device="cpu"), lora, 1.0), load_pipeline("nano", device="cpu")
    for mask_image in (None, mask):
        options = SamplingOptions(
            "a large green square", seed=3, num_steps=8, image=picture, mask_image=mask_image, strength=0.75
        )
        drawn, same, other = (generate(one, options, CacheConfig(full_steps=3)) for one in (pipe, by_hand, plain))
        assert np.abs(drawn.pixels - same.pixels).max() < 1e-3
        assert psnr(drawn.pixels, other.pixels) < 60
        if mask_image is not None:
            assert (np.asarray(drawn.image)[:, 32:] == (0, 0, 255)).all()


def test_several_loras_add_up_and_their_folder_is_as_good(plain: np.ndarray, lora: Path) -> None:
    twice = draw(loras=[str(lora), str(lora.parent)])
    assert np.abs(twice - draw(loras=[f"{lora}:2"])).max() < 1e-3
    assert np.abs(draw(loras=[str(lora), f"{lora}:-1"]) - plain).max() < 1e-3


def test_a_lora_works_on_nf4(lora: Path, nano_folder: Path) -> None:
    nf4 = draw(quantization="nf4")
    assert psnr(draw(quantization="nf4", loras=[str(lora)]), nf4) < 45


def test_a_lora_works_on_the_experts_and_on_gguf(
    weights: dict[str, torch.Tensor], plain: np.ndarray, tmp_path: Path
) -> None:
    layer = "double_stream_blocks.0.block.ff_i.experts.0.w1"
    wide, narrow = weights[f"{layer}.weight"].shape
    tensors = {"lora_A": torch.ones(2, narrow) / 8, "lora_B": torch.ones(wide, 2) / 8}
    save_file(
        {f"transformer.{layer}.{key}.weight": value for key, value in tensors.items()}, tmp_path / "e.safetensors"
    )
    given = [str(tmp_path / "e.safetensors")]
    assert psnr(draw(loras=given), plain) < 70
    write_gguf(tmp_path / "shared.gguf", weights, "BF16")
    drawn = draw(loras=given, transformer=tmp_path / "shared.gguf")
    assert np.abs(drawn - draw(loras=given)).max() < 1e-3


def test_what_of_a_lora_is_not_used_is_said(
    lora: Path, nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(lora) | {f"transformer.no.layer.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors, tmp_path / "more.safetensors")
    argv = [PROMPT, "--seed", "1", "--device", "cpu", "--lora", str(tmp_path / "more.safetensors")]
    assert inference.main([*argv, "--output", str(tmp_path / "a.png")]) == 0
    assert "2 of its" in capsys.readouterr().err


def test_a_lora_is_in_the_metadata_and_takes_the_bases_calibration(lora: Path, nano_folder: Path) -> None:
    pipe = load_pipeline("nano", device="cpu", loras=[f"{lora}:0.5"])
    (named,) = pipe.identity.loras
    assert (
        named.endswith(":0.5") and pipe.identity.fingerprint == load_pipeline("nano", device="cpu").identity.fingerprint
    )
    options = SamplingOptions(PROMPT, seed=1).resolve(PRESETS["nano"])
    resolution = resolve(CacheConfig.best(13), options.sampler(PRESETS["nano"]), pipe.calibrations)
    assert resolution.config.calibration is not None
    assert resolution.notices == (
        "the cache's calibration is looked up by the base model's weights, which LoRA changes",
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.safetensors", "lora must be a .safetensors file"),
        ("{weights}", "none of its tensors is named as one of the transformer's layers"),
        ("{lora}:nan", "must have a finite scale"),
        ("{folder}", "2 such files"),
    ],
)
def test_what_is_no_lora_is_refused(
    given: str, message: str, lora: Path, weights: dict[str, torch.Tensor], tmp_path: Path, nano_folder: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    shutil.copy(path, tmp_path / "more.safetensors")
    text = given.format(weights=path, lora=lora, folder=tmp_path)
    with pytest.raises(ValueError, match=message):
        locate(PRESETS["nano"], ModelSource(loras=(text,)))


@pytest.mark.parametrize("layer", ["double_stream_blocks.0.block.attn1.to_q", "another.layer"])
def test_another_models_lora_is_refused_in_one_line(
    layer: str, nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, name = tmp_path / "other.safetensors", f"transformer.{layer}"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 7), f"{name}.lora_B.weight": torch.ones(9, 2)}, path)
    assert run("--lora", str(path), "-o", str(tmp_path / "a.png")) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "does not fit this transformer" in line)
    assert str(path) in line and "Traceback" not in line


# How it is kept.


@pytest.mark.parametrize("parts", ["encoders", "drawing"])
@pytest.mark.parametrize("loaded", [{"tiled": True}, {"offload": "group"}], ids=str)
def test_a_half_of_the_model_can_be_kept_otherwise(parts: str, loaded: dict[str, Any], nano_folder: Path) -> None:
    pipe = load_pipeline("nano", device="cpu", parts=parts, **loaded)
    assert (pipe.transformer is None) == (parts == "encoders")


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_3", "text_encoder_4", "transformer", "vae"])
def test_a_component_that_lacks_a_weight_is_refused_not_filled_at_random(
    component: str, nano_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(nano_folder, tmp_path / "model", ignore=shutil.ignore_patterns("calibration"))
    (path,) = (folder / component).glob("*.safetensors")
    tensors = load_file(path)
    del tensors[max(tensors)]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{component} lacks [12] of the model's weights, among them "):
        load_pipeline("nano", device="cpu", model_path=folder)


def test_compiled_blocks_of_nf4_are_refused_on_a_cpu(nano_folder: Path) -> None:
    with pytest.raises(ValueError, match="do not work on a CPU: drop compile"):
        load_pipeline("nano", device="cpu", quantization="nf4", compiled=True)


@pytest.mark.parametrize("loaded", [{"offload": "group"}, {"tiled": True}], ids=str)
def test_a_model_that_is_kept_otherwise_draws_the_same(loaded: dict[str, Any], plain: np.ndarray) -> None:
    assert np.array_equal(draw(**loaded), plain)


def test_pictures_in_tiles_are_nearly_the_same(nano_folder: Path, plain: np.ndarray, monkeypatch: Any) -> None:
    monkeypatch.setattr("hi_diffusers.families.hidream.load.TILE", 32)
    tiled = draw(tiled=True)
    assert 25 < psnr(tiled, plain) < 100


def test_an_unknown_attention_backend_is_refused(nano_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"attention_backend must be one of .*, got 'nothing'"):
        load_pipeline("nano", device="cpu", attention_backend="nothing")


def test_a_backend_by_name_draws_the_same(plain: np.ndarray) -> None:
    try:
        assert np.abs(draw(attention_backend="_native_math") - plain).max() < 1e-3
    finally:
        load_pipeline("nano", device="cpu", attention_backend="native")  # diffusers' choice is the whole process's


def test_a_session_of_many_sizes_may_compile_as_often_as_it_needs(
    nano_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ninth variant of a function ended the session, or was computed uncompiled."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        HiDreamImageTransformer2DModel, "compile_repeated_blocks", lambda self, **settings: asked.append(settings)
    )
    load_pipeline("nano", device="cpu", compiled=True)
    assert asked[0]["recompile_limit"] > 18 and asked[0]["fullgraph"]


def test_compiled_parts_are_attention_and_feed_forward(nano_folder: Path) -> None:
    transformer = load_pipeline("nano", device="cpu", compiled=True).transformer
    compiled = {type(m).__name__ for m in transformer.modules() if getattr(m, "_compiled_call_impl", None)}
    assert compiled == {"HiDreamAttention", "MoEFeedForward", "SwiGLU"}


# The command line.


def run(*argv: str) -> int:
    return inference.main([PROMPT, "--device", "cpu", "--num_steps", "8", "--guidance", "2", "--seed", "3", *argv])


def test_encoders_on_a_device_of_their_own_change_no_pixel(nano_folder: Path, tmp_path: Path) -> None:
    assert run("-o", str(tmp_path / "a.png")) == run("--encoder_device", "cpu", "-o", str(tmp_path / "b.png")) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_download_only_prints_the_folder_and_draws_nothing(
    nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--download_only", "-o", str(tmp_path / "a.png")) == 0
    assert capsys.readouterr().out.split() == [str(find_folder(PRESETS["nano"], ModelSource()))]
    assert not list(tmp_path.iterdir())


def test_a_model_saved_in_nf4_draws_what_it_drew_when_it_was_quantized(nano_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nf4"
    assert run("--quantization", "nf4", "--save_quantized", str(folder)) == 0
    assert json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    llama = shutil.copytree(nano_folder / "text_encoder_4", tmp_path / "llama")
    shutil.copytree(nano_folder / "tokenizer_4", llama, dirs_exist_ok=True)
    again = ["--model_path", str(folder), "--llama", str(llama), "--cache", "off"]
    assert run("--quantization", "nf4", "--cache", "off", "-o", str(tmp_path / "a.png")) == 0
    assert run(*again, "-o", str(tmp_path / "b.png")) == 0
    from PIL import Image

    one, other = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert psnr(one, other) > 40


@pytest.mark.parametrize("argv", [("--save_quantized", "there"), ("--quantization", "nf4", "--save_quantized", ".")])
def test_save_quantized_needs_nf4_and_a_new_folder(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert (
        "--save_quantized needs --quantization nf4, no --lora, and a folder that does not exist yet"
        in capsys.readouterr().err
    )


def test_a_lora_and_a_file_reach_the_picture(
    lora: Path, weights: dict[str, torch.Tensor], nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(weights, tmp_path / "shared.safetensors")
    argv = ["--transformer", str(tmp_path / "shared.safetensors"), "--lora", f"{lora}:0.5", "--lora", str(lora)]
    assert run(*argv, "-o", str(tmp_path / "a.png")) == 0
    capsys.readouterr()
    assert run("--like", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")) == 0
    assert "was drawn with other LoRAs than those given" in capsys.readouterr().err


def test_the_layers_that_nn_linear_stands_for_are_ours_to_replace() -> None:
    """What GGUF, nf4 and LoRA replace are plain Linears: a test of this file's assumption."""
    transformer = load_pipeline("nano", device="cpu").transformer
    assert any(type(module) is nn.Linear for module in transformer.modules())

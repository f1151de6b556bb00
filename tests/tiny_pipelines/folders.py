"""Complete folders as diffusers publishes them, tiny and with random weights, that draw from a plain text prompt.

Written by stock diffusers, so that whatever reads them reads ordinary folders, and the same every time. Every parameter
of a transformer and of a VAE is random: prompts, seeds and steps show in what is drawn. The classes are those of the
published models, but for the processor of qwen-image-edit.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiTPipeline,
    FluxPipeline,
    QwenImageEditPipeline,
    WanPipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PaddleOCRVLProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny_pipelines import dit, flux, qwen, wan
from tests.tiny_pipelines.variant import seeded

WIDTH = 32  # of the text that the transformers of the other modules read
CLIP_LENGTH = 248
EDIT_STAGES = 5  # 32 pixels a latent: the pipeline edits at one megapixel, whatever it is given
LABELS = {0: "tench", 1: "goldfish", 2: "white shark"}
VISION_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _clip_tokenizer() -> CLIPTokenizer:
    """One token a byte."""
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, model_max_length=CLIP_LENGTH)


def _t5_tokenizer() -> T5Tokenizer:
    """One token a character."""
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    return T5Tokenizer(vocab=[*special, ("▁", -2.0), *((chr(code), -3.0) for code in range(33, 127))], extra_ids=0)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """Learned from the text around every prompt, of which the pipeline cuts off the first 64 tokens."""
    template = QwenImageEditPipeline(*[None] * 6).prompt_template_encode
    untrained = Qwen2Tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    return untrained.train_new_from_iterator(
        [template], vocab_size=1000, new_special_tokens=list(VISION_TOKENS), show_progress=False
    )


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return seeded(CLIPTextModel, config=config)


def _t5(kind: Any, config_kind: Any, tokenizer: T5Tokenizer) -> Any:
    config = config_kind(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return seeded(kind, config=config)


def _qwen_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    image, video, start, end = tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return seeded(Qwen2_5_VLForConditionalGeneration, config=config)


def _qwen_vae() -> AutoencoderKLQwenImage:
    vae = seeded(
        AutoencoderKLQwenImage,
        base_dim=4,
        z_dim=4,
        dim_mult=[1] * (EDIT_STAGES + 1),
        num_res_blocks=0,
        temperal_downsample=[False] * EDIT_STAGES,
        latents_mean=[0.0] * 4,
        latents_std=[0.25] * 4,
    )
    return _random(vae)


def _random(network: Any) -> Any:
    """The same network with every parameter random: matrices and kernels with unit gain, norms near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel()
            if fan_in > 1:
                parameter.copy_(noise / fan_in**0.5)
            else:
                parameter.copy_(0.1 * noise + (not name.endswith("bias")))
    return network


def _flux() -> FluxPipeline:
    """Guidance embedded, as FLUX.1 dev."""
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    return FluxPipeline(
        flux.dev_scheduler(),
        _random(flux.autoencoder()),
        _clip(clip_tokenizer),
        clip_tokenizer,
        _t5(T5EncoderModel, T5Config, t5_tokenizer),
        t5_tokenizer,
        _random(flux.transformer()),
    )


def _qwen_image_edit() -> QwenImageEditPipeline:
    """Read by the processor of PaddleOCR-VL: Qwen2VLProcessor cannot be loaded without torchvision, which it needs for
    videos alone. Of a text and a picture both make the same tensors.
    """
    tokenizer = _qwen_tokenizer()
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    return QwenImageEditPipeline(
        qwen.scheduler(),
        _qwen_vae(),
        _qwen_text_encoder(tokenizer),
        tokenizer,
        PaddleOCRVLProcessor(image_processor, tokenizer),
        _random(qwen.transformer()),
    )


def _wan() -> WanPipeline:
    """For up to 512 pixels a side and 125 frames, the 32 places of its rotary embedding in each direction."""
    tokenizer = _t5_tokenizer()
    text_encoder = _t5(UMT5EncoderModel, UMT5Config, tokenizer)
    return WanPipeline(tokenizer, text_encoder, _random(wan.vae()), wan.scheduler(), _random(wan.transformer()))


def _dit() -> DiTPipeline:
    pipe = DiTPipeline(_random(dit.transformer()), _random(flux.autoencoder()), dit.ddim().scheduler, LABELS)
    pipe.register_to_config(id2label=LABELS)
    return pipe


BUILDERS: dict[str, Callable[[], Any]] = {
    "flux": _flux,
    "qwen-image-edit": _qwen_image_edit,
    "wan": _wan,
    "dit": _dit,
}
ALL = tuple(BUILDERS)


def write_folders(out: Path, names: Sequence[str] = ALL) -> None:
    """Write the folders of these names into `out`; the same files every time."""
    for name in names:
        BUILDERS[name]().save_pretrained(out / name)

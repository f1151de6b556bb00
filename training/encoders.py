"""The four text encoders of hidream-nano, in the classes that HiDream's pipeline expects, and what they return."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
)

from training.captions import LLAMA_POSITIONS, CaptionBatch
from training.tokenizers import FOLDERS

WIDTH = 64
ENCODER_CLASSES = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
    "text_encoder_4": LlamaForCausalLM,
}
# What a trained folder holds.
FILES = (
    *(f"{name}/config.json" for name in ENCODER_CLASSES),
    *(f"{name}/model.safetensors" for name in ENCODER_CLASSES),
    *(f"{name}/tokenizer.json" for name in FOLDERS),
)


def build_encoders(vocab_size: int) -> nn.ModuleDict:
    """Random encoders by folder name, in the classes that HiDream's pipeline expects; all are WIDTH wide."""
    clip = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=248,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=1,
    )
    t5 = T5Config(
        vocab_size=vocab_size,
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=3 * WIDTH,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    llama = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LLAMA_POSITIONS,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=1,
    )
    configs = (clip, clip, t5, llama)
    encoders = {name: build(config) for (name, build), config in zip(ENCODER_CLASSES.items(), configs, strict=True)}
    # T5's padding starts far longer than anything a block adds, so the final norm makes it constant.
    encoders["text_encoder_3"].get_input_embeddings().weight.data[t5.pad_token_id] *= 64
    return nn.ModuleDict(encoders)


def load_encoders(folder: Path) -> nn.ModuleDict:
    """The encoders that `folder` holds, in fp32."""
    loaded = {name: kind.from_pretrained(folder / name, dtype=torch.float32) for name, kind in ENCODER_CLASSES.items()}
    return nn.ModuleDict(loaded)


@dataclass(frozen=True)
class Encoded:
    """What the transformer gets: `pooled` of each CLIP [B, D], `t5` [B, T, D], `llama` [layers, B, T, D]."""

    pooled: tuple[Tensor, ...]
    t5: Tensor
    llama: Tensor
    llama_logits: Tensor


def encode(encoders: nn.ModuleDict, batch: CaptionBatch) -> Encoded:
    """Run the four encoders as HiDream's pipeline does."""
    pooled = tuple(encoders[name](batch.clip).text_embeds for name in ("text_encoder", "text_encoder_2"))
    t5 = encoders["text_encoder_3"](batch.t5, attention_mask=batch.t5_mask).last_hidden_state
    llama = encoders["text_encoder_4"](
        batch.llama,
        attention_mask=batch.llama_mask,
        position_ids=batch.llama_positions,
        output_hidden_states=True,
    )
    return Encoded(pooled, t5, torch.stack(llama.hidden_states[1:]), llama.logits)

"""The layers of HiDream-I1's components, from their configurations alone.

No large library is imported: a memory plan needs only numbers, and the libraries take seconds to load.
A setting that a configuration leaves out has the default of the component's class.

Shapes: a linear's weight is (outputs, inputs), a convolution's (outputs, inputs, kernel, kernel).
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from hi_diffusers.weights.layers import Layer

# As in models/embeddings.py and models/moe.py, which cannot be imported without torch.
TIMESTEP_FREQUENCIES = 256
HIDDEN_MULTIPLE = 256
# transformers' aliases of d_model, num_heads, num_layers and d_kv; every published T5 uses the latter names.
T5_ALIASES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim")


def clip_layers(config: Mapping[str, Any]) -> list[Layer]:
    """The layers of transformers' CLIPTextModelWithProjection."""
    width, hidden = config.get("hidden_size", 512), config.get("intermediate_size", 2048)
    layers = [
        _embedding("text_model.embeddings.token_embedding", config.get("vocab_size", 49408), width),
        _embedding("text_model.embeddings.position_embedding", config.get("max_position_embeddings", 77), width),
    ]
    for index in range(config.get("num_hidden_layers", 12)):
        block = f"text_model.encoder.layers.{index}"
        layers += [
            *(_linear(f"{block}.self_attn.{part}_proj", width, width) for part in ("k", "v", "q", "out")),
            _norm(f"{block}.layer_norm1", width),
            _linear(f"{block}.mlp.fc1", width, hidden),
            _linear(f"{block}.mlp.fc2", hidden, width),
            _norm(f"{block}.layer_norm2", width),
        ]
    layers.append(_norm("text_model.final_layer_norm", width))
    layers.append(_linear("text_projection", width, config.get("projection_dim", 512), bias=False))
    return layers


def t5_layers(config: Mapping[str, Any]) -> list[Layer]:
    """The layers of transformers' T5EncoderModel with a gated feed-forward; its embedding counts once, as `shared`."""
    _refuse_other_t5(config)
    width, hidden = config.get("d_model", 512), config.get("d_ff", 2048)
    heads = config.get("num_heads", 8)
    inner = heads * config.get("d_kv", 64)
    layers = [_embedding("shared", config.get("vocab_size", 32128), width)]
    for index in range(config.get("num_layers", 6)):
        attention, feed_forward = (f"encoder.block.{index}.layer.{part}" for part in range(2))
        layers += [_linear(f"{attention}.SelfAttention.{part}", width, inner, bias=False) for part in "qkv"]
        layers.append(_linear(f"{attention}.SelfAttention.o", inner, width, bias=False))
        if index == 0:  # the other blocks use the first one's
            buckets = config.get("relative_attention_num_buckets", 32)
            layers.append(_embedding(f"{attention}.SelfAttention.relative_attention_bias", buckets, heads))
        layers += [
            _rms_norm(f"{attention}.layer_norm", width),
            _linear(f"{feed_forward}.DenseReluDense.wi_0", width, hidden, bias=False),
            _linear(f"{feed_forward}.DenseReluDense.wi_1", width, hidden, bias=False),
            _linear(f"{feed_forward}.DenseReluDense.wo", hidden, width, bias=False),
            _rms_norm(f"{feed_forward}.layer_norm", width),
        ]
    layers.append(_rms_norm("encoder.final_layer_norm", width))
    return layers


def llama_layers(config: Mapping[str, Any]) -> list[Layer]:
    """The layers of transformers' LlamaModel, which has no head."""
    width, hidden = config.get("hidden_size", 4096), config.get("intermediate_size", 11008)
    heads = config.get("num_attention_heads", 32)
    head_dim = config.get("head_dim") or width // heads
    queries, keys = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    layers = [_embedding("embed_tokens", config.get("vocab_size", 32000), width)]
    for index in range(config.get("num_hidden_layers", 32)):
        block = f"layers.{index}"
        layers += [
            _linear(f"{block}.self_attn.q_proj", width, queries, attention_bias),
            _linear(f"{block}.self_attn.k_proj", width, keys, attention_bias),
            _linear(f"{block}.self_attn.v_proj", width, keys, attention_bias),
            _linear(f"{block}.self_attn.o_proj", queries, width, attention_bias),
            _linear(f"{block}.mlp.gate_proj", width, hidden, mlp_bias),
            _linear(f"{block}.mlp.up_proj", width, hidden, mlp_bias),
            _linear(f"{block}.mlp.down_proj", hidden, width, mlp_bias),
            _rms_norm(f"{block}.input_layernorm", width),
            _rms_norm(f"{block}.post_attention_layernorm", width),
        ]
    layers.append(_rms_norm("norm", width))
    return layers


def transformer_layers(config: Mapping[str, Any]) -> list[Layer]:
    """The layers of HiDreamImageTransformer2DModel."""
    width = config.get("num_attention_heads", 20) * config.get("attention_head_dim", 128)
    experts = config.get("num_routed_experts", 4)
    num_double, num_single = config.get("num_layers", 16), config.get("num_single_layers", 32)
    t5_channels, llama_channels = config.get("caption_channels", (4096, 4096))
    in_channels = config.get("in_channels", 64)
    out_channels = config.get("out_channels") or in_channels
    pixels = config.get("patch_size", 2) ** 2
    layers = [
        *_conditioning_embedder("t_embedder.timestep_embedder", TIMESTEP_FREQUENCIES, width),
        *_conditioning_embedder("p_embedder.pooled_embedder", config.get("text_emb_dim", 2048), width),
        _linear("x_embedder.proj", pixels * in_channels, width),
    ]
    for index in range(num_double):
        layers += _double_stream_block(f"double_stream_blocks.{index}.block", width, experts)
    for index in range(num_single):
        layers += _single_stream_block(f"single_stream_blocks.{index}.block", width, experts)
    layers.append(_linear("final_layer.linear", width, pixels * out_channels))
    layers.append(_linear("final_layer.adaLN_modulation.1", width, 2 * width))
    for index, channels in enumerate([llama_channels] * (num_double + num_single) + [t5_channels]):
        layers.append(_linear(f"caption_projection.{index}.linear", channels, width, bias=False))
    return layers


def vae_layers(config: Mapping[str, Any]) -> list[Layer]:
    """The layers of diffusers' AutoencoderKL with its plain blocks."""
    channels = list(config.get("block_out_channels", (64,)))
    for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        types = list(config.get(key, (block,)))
        if types != [block] * len(channels):
            raise ValueError(f"{key} must be {block} for each of the {len(channels)} block_out_channels, got {types}")
    latent, depth = config.get("latent_channels", 4), config.get("layers_per_block", 1)
    attends = config.get("mid_block_add_attention", True)
    layers = [
        *_vae_encoder(config.get("in_channels", 3), channels, latent, depth, attends),
        *_vae_decoder(config.get("out_channels", 3), channels, latent, depth, attends),
    ]
    if config.get("use_quant_conv", True):
        layers.append(_conv("quant_conv", 2 * latent, 2 * latent, kernel=1))
    if config.get("use_post_quant_conv", True):
        layers.append(_conv("post_quant_conv", latent, latent, kernel=1))
    return layers


# Parts of T5.


def swiglu_hidden(hidden: int) -> int:
    """The hidden width of a SwiGLU that replaces a feed-forward of width `hidden`: 2/3 of it, rounded up to 256."""
    return -(-int(2 * hidden / 3) // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE


def _refuse_other_t5(config: Mapping[str, Any]) -> None:
    form = config.get("feed_forward_proj", "relu")
    if not form.startswith("gated-"):
        raise ValueError(f"feed_forward_proj must be gated, as gated-gelu is, got {form!r}")
    if not config.get("is_gated_act", True):  # this setting overrides feed_forward_proj
        raise ValueError(f"is_gated_act must be true, got {config['is_gated_act']!r}")
    for alias in T5_ALIASES:
        if alias in config:
            raise ValueError(f"{alias} must be given by T5's own name, got {alias}={config[alias]!r}")


# Parts of the transformer.


def _conditioning_embedder(name: str, inputs: int, width: int) -> list[Layer]:
    return [_linear(f"{name}.linear_1", inputs, width), _linear(f"{name}.linear_2", width, width)]


def _double_stream_block(name: str, width: int, experts: int) -> list[Layer]:
    return [
        _linear(f"{name}.adaLN_modulation.1", width, 12 * width),
        *_joint_attention(f"{name}.attn1", width),
        *_joint_attention(f"{name}.attn1", width, stream="_t"),
        *_image_feed_forward(f"{name}.ff_i", width, experts),
        *_swiglu(f"{name}.ff_t", width, 4 * width),
    ]


def _single_stream_block(name: str, width: int, experts: int) -> list[Layer]:
    return [
        _linear(f"{name}.adaLN_modulation.1", width, 6 * width),
        *_joint_attention(f"{name}.attn1", width),
        *_image_feed_forward(f"{name}.ff_i", width, experts),
    ]


def _joint_attention(name: str, width: int, stream: str = "") -> list[Layer]:
    return [
        *(_linear(f"{name}.to_{part}{stream}", width, width) for part in ("q", "k", "v", "out")),
        *(_rms_norm(f"{name}.{part}_rms_norm{stream}", width) for part in ("q", "k")),
    ]


def _image_feed_forward(name: str, width: int, experts: int) -> list[Layer]:
    if experts == 0:
        return _swiglu(name, width, 4 * width)
    layers = _swiglu(f"{name}.shared_experts", width, 2 * width)
    for index in range(experts):
        layers += _swiglu(f"{name}.experts.{index}", width, 4 * width)
    layers.append(Layer(f"{name}.gate", ((experts, width),)))
    return layers


def _swiglu(name: str, width: int, hidden: int) -> list[Layer]:
    hidden = swiglu_hidden(hidden)
    return [
        _linear(f"{name}.w1", width, hidden, bias=False),
        _linear(f"{name}.w2", hidden, width, bias=False),
        _linear(f"{name}.w3", width, hidden, bias=False),
    ]


# Parts of the VAE.


def _vae_encoder(inputs: int, channels: list[int], latent: int, depth: int, attends: bool) -> list[Layer]:
    first, last = channels[0], channels[-1]
    layers = [_conv("encoder.conv_in", inputs, first)]
    for index, (before, width) in enumerate(pairwise([first, *channels])):
        block = f"encoder.down_blocks.{index}"
        layers += _resnets(f"{block}.resnets", before, width, depth)
        if index < len(channels) - 1:
            layers.append(_conv(f"{block}.downsamplers.0.conv", width, width))
    layers += _middle("encoder.mid_block", last, attends)
    layers.append(_norm("encoder.conv_norm_out", last))
    layers.append(_conv("encoder.conv_out", last, 2 * latent))  # a mean and a variance
    return layers


def _vae_decoder(outputs: int, channels: list[int], latent: int, depth: int, attends: bool) -> list[Layer]:
    first, last = channels[0], channels[-1]
    layers = [_conv("decoder.conv_in", latent, last)]
    for index, (before, width) in enumerate(pairwise([last, *reversed(channels)])):
        block = f"decoder.up_blocks.{index}"
        layers += _resnets(f"{block}.resnets", before, width, depth + 1)
        if index < len(channels) - 1:
            layers.append(_conv(f"{block}.upsamplers.0.conv", width, width))
    layers += _middle("decoder.mid_block", last, attends)
    layers.append(_norm("decoder.conv_norm_out", first))
    layers.append(_conv("decoder.conv_out", first, outputs))
    return layers


def _middle(name: str, width: int, attends: bool) -> list[Layer]:
    attention = f"{name}.attentions.0"
    layers = []
    if attends:
        layers.append(_norm(f"{attention}.group_norm", width))
        layers += [_linear(f"{attention}.{part}", width, width) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    return layers + _resnets(f"{name}.resnets", width, width, 2)


def _resnets(name: str, inputs: int, outputs: int, count: int) -> list[Layer]:
    layers = []
    for index in range(count):
        before = inputs if index == 0 else outputs
        layers += [
            _norm(f"{name}.{index}.norm1", before),
            _conv(f"{name}.{index}.conv1", before, outputs),
            _norm(f"{name}.{index}.norm2", outputs),
            _conv(f"{name}.{index}.conv2", outputs, outputs),
        ]
        if before != outputs:
            layers.append(_conv(f"{name}.{index}.conv_shortcut", before, outputs, kernel=1))
    return layers


# Single layers.


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Layer:
    return Layer(name, ((outputs, inputs), (outputs,)) if bias else ((outputs, inputs),), is_linear=True)


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Layer:
    return Layer(name, ((outputs, inputs, kernel, kernel), (outputs,)))


def _embedding(name: str, count: int, width: int) -> Layer:
    return Layer(name, ((count, width),))


def _norm(name: str, width: int) -> Layer:
    return Layer(name, ((width,), (width,)))


def _rms_norm(name: str, width: int) -> Layer:
    return Layer(name, ((width,),))

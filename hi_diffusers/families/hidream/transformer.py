"""The HiDream-I1 transformer: it maps noisy latents, timestep and text to the velocity.

It was written from the published configuration. Parameters are named and shaped as in the checkpoint, so that weights
can be exchanged with diffusers' class of the same name.

Shapes: B batch, S image tokens, T text tokens, D width, C latent channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from cache_functions import CacheState, Current, FeatureName, compute_or_forecast, forecasts, kept_features
from hi_diffusers.families.hidream.blocks import PARTS, TARGET, DoubleStreamBlock, HiDreamBlock, SingleStreamBlock
from hi_diffusers.families.hidream.embeddings import (
    CaptionProjection,
    KeyMask,
    OutEmbed,
    PatchEmbed,
    PooledEmbed,
    Rotary,
    RotaryTable,
    TimestepEmbed,
    grid_positions,
    patchify,
    unpatchify,
)
from hi_diffusers.families.hidream.fast_paths import HasFastPaths
from hi_diffusers.families.hidream.forecast import add_forecasts, is_summable
from hi_diffusers.families.hidream.library_caches import LibraryCaches, is_wrapped_by_cache_dit
from hi_diffusers.families.hidream.moe import MoEFeedForward
from hi_diffusers.families.hidream.published import TRANSFORMER
from hi_diffusers.weights.single_file import load_single_file

RESIDUAL = FeatureName("residual")
MOVING_HOOKS = ("group_offloading", "layerwise_casting")


@dataclass(frozen=True)
class Conditioning:
    """Tensors that are constant over a generation, computed by `HiDreamImageTransformer2DModel.prepare`.

    Attributes:
        llama: projected states of every block's Llama layer, [B,T,D] each.
        text: the text tokens that run through all blocks: T5, then the last Llama layer, [B,T5+T,D].
        pooled: embedded pooled text [B,D].
        rotary: rotation of the image tokens.
        grid: rows and columns of patches.
        num_tokens: number of image tokens, padding included; under context parallelism those of all ranks.
        key_mask: [B or 1, S], 0 where an image token is padding; None without padding.
        gates: the image's gates [N,F,B,D] of all steps and of both sub-layers of all blocks; None if they are computed
            when they are needed.
    """

    llama: tuple[Tensor, ...]
    text: Tensor
    pooled: Tensor
    rotary: Rotary
    grid: tuple[int, int]
    num_tokens: int
    key_mask: Tensor | None
    gates: Tensor | None = None

    def chunk(self, parts: int, dim: int = 0) -> list["Conditioning"]:
        """Split the batch, as `Tensor.chunk` splits dimension 0; diffusers' FasterCache leaves out a half so."""

        def split(tensor: Tensor, axis: int = dim) -> tuple[Tensor, ...]:
            return (tensor,) * parts if tensor.shape[axis] == 1 else tensor.chunk(parts, axis)

        llama = zip(*(split(one) for one in self.llama), strict=True)
        rotary = map(Rotary, split(self.rotary.cos), split(self.rotary.sin))
        key_masks = (None,) * parts if self.key_mask is None else split(self.key_mask)
        gates = (None,) * parts if self.gates is None else split(self.gates, 2)
        split_tensors = zip(llama, split(self.text), split(self.pooled), rotary, key_masks, gates, strict=True)
        return [
            replace(self, llama=one, text=text, pooled=pooled, rotary=turn, key_mask=mask, gates=gate)
            for one, text, pooled, turn, mask, gate in split_tensors
        ]


class HiDreamImageTransformer2DModel(ModelMixin, ConfigMixin, LibraryCaches, PeftAdapterMixin, HasFastPaths):
    """The transformer; at full size it has 16 double-stream and 32 single-stream blocks.

    Args:
        patch_size: latent pixels along a patch's side, 2.
        in_channels: latent channels C, 16.
        out_channels: channels of the velocity; None is in_channels.
        num_layers: double-stream blocks.
        num_single_layers: single-stream blocks.
        attention_head_dim: channels per head.
        num_attention_heads: number of heads; D is the product of both.
        caption_channels: widths of T5's and of Llama's states.
        text_emb_dim: width of the pooled text, both CLIPs together.
        num_routed_experts: experts of an image feed-forward; 0 makes it a plain SwiGLU.
        num_activated_experts: experts per token.
        axes_dims_rope: channels rotated along (nothing, row, column).
        max_resolution: largest latent, in latent pixels; non-square pictures are padded to its number of tokens.
        llama_layers: the Llama layer that each block reads.
        force_inference_output: ignored, kept for the configuration; the output is a latent in training, too.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["DoubleStreamBlock", "SingleStreamBlock"]
    _repeated_blocks = ["HiDreamAttention", "MoEFeedForward", "SwiGLU"]
    _skip_layerwise_casting_patterns = [
        "x_embedder",
        "t_embedder",
        "p_embedder",
        "adaLN_modulation",
        "norm",
        "final_layer",
    ]

    # Context parallelism splits the tokens; all between x_embedder and final_layer is computed for a rank's share.
    _cp_plan = {
        "x_embedder": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "caption_projection.*": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "rotary_table": {
            0: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
            1: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
        },
        "key_mask": {0: ContextParallelInput(split_dim=1, expected_dims=2, split_output=True)},
        "final_layer": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 16,
        num_single_layers: int = 32,
        attention_head_dim: int = 128,
        num_attention_heads: int = 20,
        caption_channels: tuple[int, int] = (4096, 4096),
        text_emb_dim: int = 2048,
        num_routed_experts: int = 4,
        num_activated_experts: int = 2,
        axes_dims_rope: tuple[int, ...] = (64, 32, 32),
        max_resolution: tuple[int, int] = (128, 128),
        llama_layers: tuple[int, ...] | None = None,
        force_inference_output: bool = False,
    ):
        super().__init__()
        num_blocks = num_layers + num_single_layers
        if llama_layers is None or len(llama_layers) != num_blocks:
            raise ValueError(
                f"llama_layers must name one layer for each of the {num_blocks} blocks, got {llama_layers}"
            )
        if not axes_dims_rope or any(part % 2 for part in axes_dims_rope) or sum(axes_dims_rope) > attention_head_dim:
            raise ValueError(
                f"axes_dims_rope must be even numbers of at most {attention_head_dim} together, got {axes_dims_rope}"
            )
        width = attention_head_dim * num_attention_heads
        self.inner_dim = width
        self.out_channels = out_channels or in_channels
        self.max_seq = max_resolution[0] * max_resolution[1] // patch_size**2
        self.t_embedder = TimestepEmbed(width)
        self.p_embedder = PooledEmbed(text_emb_dim, width)
        self.x_embedder = PatchEmbed(patch_size, in_channels, width)
        self.rotary_table = RotaryTable(tuple(axes_dims_rope))
        self.key_mask = KeyMask()
        shape = (width, num_attention_heads, attention_head_dim, num_routed_experts, num_activated_experts)
        self.double_stream_blocks = nn.ModuleList(
            [HiDreamBlock(DoubleStreamBlock(*shape, layer)) for layer in range(num_layers)]
        )
        self.single_stream_blocks = nn.ModuleList(
            [HiDreamBlock(SingleStreamBlock(*shape, layer)) for layer in range(num_layers, num_blocks)]
        )
        self.final_layer = OutEmbed(width, patch_size, self.out_channels)
        t5_channels, llama_channels = caption_channels
        self.caption_projection = nn.ModuleList(
            [CaptionProjection(llama_channels, width) for _ in range(num_blocks)]
            + [CaptionProjection(t5_channels, width)]
        )

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        config: str | Path | Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "HiDreamImageTransformer2DModel":
        """Load a .safetensors or .gguf file that holds the transformer alone.

        Args:
            path: the file.
            config: the configuration, or the folder of a transformer's config.json; None is HiDream-I1's.
            dtype: dtype of the arithmetic, and of weights that are not quantized.
            device: device of the weights.

        Raises:
            ValueError: if weights are missing or another model's.
        """
        if isinstance(config, str | Path):
            config = cast("Mapping[str, Any]", cls.load_config(config))
        with torch.device("meta"):
            model = cls.from_config(TRANSFORMER if config is None else dict(config))
        loaded: HiDreamImageTransformer2DModel = load_single_file(model, Path(path), torch.device(device), dtype)
        return loaded

    @apply_forward_hook
    def prepare(
        self,
        encoder_hidden_states_t5: Tensor,
        encoder_hidden_states_llama3: Tensor,
        pooled_embeds: Tensor,
        grid: tuple[int, int],
        *,
        img_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Conditioning:
        """Compute the tensors that are constant over a generation, and stack the experts.

        Args:
            encoder_hidden_states_t5: [B,T5,caption_channels[0]].
            encoder_hidden_states_llama3: hidden states of all Llama layers [L,B,T,caption_channels[1]].
            pooled_embeds: [B,text_emb_dim].
            grid: rows and columns of patches. A non-square grid is padded to `max_seq` tokens, as in training.
            img_ids: positions of the image tokens [B,S,3]; None takes them from the grid.
            key_mask: padding mask [B,S]; None takes it from the grid.

        Raises:
            ValueError: if the grid has more patches than the model takes, or a Llama layer is missing.
        """
        self._load_own_parts()
        self.stack_experts()
        rows, columns = grid
        num_tokens = rows * columns if rows == columns else self.max_seq
        if rows * columns > num_tokens:
            raise ValueError(f"a picture of {rows} x {columns} patches is more than the model's {self.max_seq}")
        layers = self.config.llama_layers
        num_layers = len(encoder_hidden_states_llama3)
        if max(layers) >= num_layers:
            raise ValueError(f"the model reads Llama layers up to {max(layers)}, got states of {num_layers} layers")
        llama = tuple(
            projection(encoder_hidden_states_llama3[layer])
            for projection, layer in zip(self.caption_projection, layers, strict=False)
        )
        device = llama[0].device
        if img_ids is None:
            img_ids = grid_positions(rows, columns, num_tokens)
            if rows != columns:
                key_mask = (torch.arange(num_tokens, device=device) < rows * columns)[None].to(llama[0].dtype)
        return Conditioning(
            llama=llama,
            text=torch.cat((self.caption_projection[-1](encoder_hidden_states_t5), llama[-1]), dim=1),
            pooled=self.p_embedder(pooled_embeds),
            rotary=Rotary(*self.rotary_table(img_ids, device)),
            grid=grid,
            num_tokens=img_ids.shape[1],
            key_mask=None if key_mask is None else self.key_mask(key_mask),
        )

    @apply_forward_hook
    def prepare_gates(self, conditioning: Conditioning, timesteps: Tensor) -> Conditioning:
        """Compute the gates of all steps at once; forecast steps of target module need nothing else of the blocks.

        Args:
            conditioning: the result of `prepare`.
            timesteps: timesteps of all steps, [N].

        Returns:
            The conditioning with gates; unchanged if the blocks' weights are offloaded.
        """
        if not self.takes("one_forecast") or self._moves_weights():
            return conditioning
        pooled = conditioning.pooled
        temb = (self.t_embedder(timesteps.to(pooled.device), pooled.dtype)[:, None] + pooled).flatten(0, 1)
        # copies, since a gate may be a view that would keep the whole projection of its block
        gates = [one.gate.clone() for block in self._stacks() for one in block.adaLN_modulation.image_gates(temb)]
        per_step = torch.stack(gates).squeeze(2).unflatten(1, (len(timesteps), len(pooled)))
        return replace(conditioning, gates=per_step.transpose(0, 1).contiguous())

    def stack_experts(self) -> None:
        """Stack the experts of every feed-forward in one tensor, unless hooks move or cast their weights."""
        allowed = not self._moves_weights()
        for module in self.modules():
            if isinstance(module, MoEFeedForward):
                module.stack_experts(allowed)

    def _moves_weights(self) -> bool:
        """Whether hooks move or cast the blocks' weights."""
        hooked = any(
            hook in registry.hooks
            for module in self.modules()
            if (registry := getattr(module, "_diffusers_hook", None)) is not None
            for hook in MOVING_HOOKS
        )
        return hooked or any(hasattr(module, "_hf_hook") for module in self.modules() if module is not self)

    def _stacks(self) -> list[DoubleStreamBlock | SingleStreamBlock]:
        """All blocks, in their order."""
        return [one.block for one in (*self.double_stream_blocks, *self.single_stream_blocks)]

    def _load_own_parts(self) -> None:
        """Load the parts outside the blocks, which group offloading would load only in `forward`, after `prepare`."""
        registry = getattr(self, "_diffusers_hook", None)
        hook = registry and registry.get_hook("group_offloading")
        if hook is not None:
            hook.pre_forward(self)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timesteps: Tensor | None = None,
        encoder_hidden_states_t5: Tensor | None = None,
        encoder_hidden_states_llama3: Tensor | None = None,
        pooled_embeds: Tensor | None = None,
        img_ids: Tensor | None = None,
        img_sizes: Any = None,
        hidden_states_masks: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        *,
        conditioning: Conditioning | None = None,
        cache_dic: CacheState | None = None,
        current: Current | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Evaluate the transformer. The result is minus the velocity, as in the checkpoint.

        Args:
            hidden_states: latents [B,C,H,W], or patches [B,S,P*P*C] together with the next three.
            timesteps: [B], 0..1000.
            encoder_hidden_states_t5, encoder_hidden_states_llama3, pooled_embeds: as in `prepare`.
            img_ids, img_sizes, hidden_states_masks: positions [B,S,3], (rows, columns) of each picture, and the
                padding mask [B,S], needed if hidden_states are patches.
            attention_kwargs: {"scale": ...} scales LoRA.
            return_dict: False returns a tuple.
            conditioning: the result of `prepare`, instead of the text arguments.
            cache_dic, current: the cache and the running step, or None.

        Raises:
            ValueError: if arguments are missing or do not fit each other, or two caches are switched on.
        """
        self.check_caches(cache_dic)
        if timesteps is None:
            raise ValueError("timesteps must be given, got None")
        if cache_dic is not None and current is None:
            raise ValueError("current must be given with cache_dic (it is the step that cal_type began), got None")
        patches = hidden_states
        if hidden_states.ndim == 4:
            if hidden_states_masks is not None:
                raise ValueError(
                    "hidden_states_masks must not be given with latents of four dimensions, only with patches of three"
                )
            img_ids = None  # positions follow from the latents' size
            grid = tuple(side // self.config.patch_size for side in hidden_states.shape[-2:])
            patches = patchify(hidden_states, self.config.patch_size)
        elif img_ids is None or img_sizes is None or hidden_states_masks is None:
            raise ValueError(
                "hidden_states of three dimensions need img_ids, img_sizes and hidden_states_masks as well"
            )
        else:
            sizes = {tuple(int(side) for side in size) for size in img_sizes}
            if len(sizes) != 1:
                raise ValueError(f"all pictures of a batch must have one size, got {sorted(sizes)}")
            (grid,) = sizes
        if conditioning is None:
            if encoder_hidden_states_t5 is None or encoder_hidden_states_llama3 is None or pooled_embeds is None:
                raise ValueError("the text must be given, as three embeddings or as conditioning; got neither")
            conditioning = self.prepare(
                encoder_hidden_states_t5,
                encoder_hidden_states_llama3,
                pooled_embeds,
                grid,
                img_ids=img_ids,
                key_mask=hidden_states_masks,
            )
        elif conditioning.grid != grid:
            raise ValueError(f"conditioning was prepared for {conditioning.grid} patches, hidden_states have {grid}")
        if len(conditioning.pooled) != len(patches):
            raise ValueError(
                f"the text is that of {len(conditioning.pooled)} pictures, hidden_states of {len(patches)}"
            )
        num_padding = conditioning.num_tokens - patches.shape[1]
        image = self.x_embedder(F.pad(patches, (0, 0, 0, num_padding)) if num_padding else patches)
        temb = self.t_embedder(timesteps, hidden_states.dtype) + conditioning.pooled
        tokens = self._stack(image, temb, conditioning, cache_dic, current)
        sample = unpatchify(self.final_layer(tokens, temb), grid, self.config.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _stack(
        self,
        image: Tensor,
        temb: Tensor,
        conditioning: Conditioning,
        cache_dic: CacheState | None,
        current: Current | None,
    ) -> Tensor:
        """Run or forecast all blocks on image tokens [B,S,D]; target residual caches what they add."""

        def compute() -> tuple[Tensor, Tensor]:
            output = self._blocks(image, temb, conditioning, cache_dic, current)
            return output - image, output

        added, output = compute_or_forecast(cache_dic, current, RESIDUAL, compute)
        return image + added if output is None else output

    def _blocks(
        self,
        image: Tensor,
        temb: Tensor,
        conditioning: Conditioning,
        cache_dic: CacheState | None,
        current: Current | None,
    ) -> Tensor:
        """Run both stacks on image tokens [B,S,D]. If the blocks are forecast, no text token is computed."""
        if conditioning.gates is not None and self.takes("one_forecast"):
            kept = kept_features(cache_dic, current, [one.feature(part) for one in self._stacks() for part in PARTS])
            if kept is not None and is_summable(kept.anchors, image):
                return add_forecasts(image, conditioning.gates[kept.step], kept.anchors, kept.weights)
        rotary, key_mask, text, llama = (
            conditioning.rotary,
            conditioning.key_mask,
            conditioning.text,
            conditioning.llama,
        )
        stages = self.stages
        if stages is not None:
            for stage in stages:
                image, text = stage(image, text, llama, temb, rotary, key_mask)
            return image
        for block in self.double_stream_blocks:
            image, text = block(image, text, llama, temb, rotary, key_mask, cache_dic, current)
        num_image = image.shape[1]
        tokens = image if forecasts(cache_dic, current, TARGET) else torch.cat((image, text), dim=1)
        # cache-dit subtracts what a list of blocks is given from what it returns, which must have the same size
        last = None if is_wrapped_by_cache_dit(self) else len(self.single_stream_blocks) - 1
        for index, block in enumerate(self.single_stream_blocks):
            num_outputs = num_image if index == last else tokens.shape[1]
            tokens = block(tokens, llama, temb, rotary, key_mask, num_outputs, cache_dic, current)
        return tokens[:, :num_image]

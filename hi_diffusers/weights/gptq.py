"""GPTQ-INT4 as AutoGPTQ wrote it (format v1): a Linear that unpacks its weight whenever it is used.

A text encoder runs once per prompt, so simplicity beats speed. Shapes: I inputs, O outputs, G groups of inputs that
share a scale and a zero.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from hi_diffusers.weights.layers import Layer

BITS = 4
PER_WORD = 32 // BITS
LEVELS = 2**BITS - 1
GROUP = 128  # inputs that share a scale in the published files
UNPACKING = 12  # bytes per number of `GPTQLinear.dequantize`: three int32 at once


class GPTQLinear(nn.Module):
    """A Linear layer kept as 4-bit integers: w[i, o] = (q[i, o] - zero[group of i, o]) * scale[group of i, o].

    Args:
        in_features, out_features: as in a Linear; both multiples of 8.
        group_size: inputs that share a scale and a zero; -1 is all of them.
        bias: whether it has one.

    Buffers:
        qweight: int32 [I/8, O]; eight inputs per word, the lowest bits first.
        qzeros: int32 [G, O/8]; the zeros minus one, eight outputs per word.
        scales: float16 [G, O].
        g_idx: int32 [I]; the group of each input, unsorted if the inputs were ordered by activation.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: bool = False):
        super().__init__()
        groups = 1 if group_size == -1 else -(-in_features // group_size)
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.zeros(in_features // PER_WORD, out_features, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, out_features // PER_WORD, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(in_features, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16) if bias else None)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I]."""
        shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=self.qweight.device)
        levels = (self.qweight[:, None, :] >> shifts[:, None]) & LEVELS
        zeros = (((self.qzeros[:, :, None] >> shifts) & LEVELS) + 1) & LEVELS  # a zero of 0 is stored as 15
        group = self.g_idx.long()
        offsets = levels.flatten(0, 1) - zeros.flatten(1)[group]
        return (offsets * self.scales.to(dtype)[group]).T

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def gptq_bytes(layer: Layer) -> int:
    """Bytes of a Linear's weight in GPTQ-INT4: half a byte per number, and its groups' scales, zeros and indices."""
    groups = -(-layer.in_features // GROUP)
    scales_and_zeros = groups * layer.out_features * 2 + groups * layer.out_features // 2
    return layer.in_features * layer.out_features // 2 + scales_and_zeros + layer.in_features * 4


def take_gptq(model: nn.Module, group_size: int) -> None:
    """Replace the Linears of a model on the meta device by GPTQLinear.

    Args:
        group_size: inputs that share a scale and a zero.
    """
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            shape = (linear.in_features, linear.out_features, group_size)
            model.set_submodule(name, GPTQLinear(*shape, bias=linear.bias is not None))


def fill_gptq(model: nn.Module, folder: Path, dtype: torch.dtype, computed: str) -> None:
    """Load the weights of a language model without its head, after `take_gptq`.

    Args:
        folder: folder of safetensors files.
        dtype: dtype of embeddings and norms, and so of the arithmetic.
        computed: prefix of the names of buffers that are computed, not read.

    Raises:
        ValueError: if the folder holds other weights than the model's.
    """
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not name.startswith("lm_head."):
                    inner = name.removeprefix("model.")
                    plain = inner.endswith(("norm.weight", "embed_tokens.weight"))
                    state[inner] = file.get_tensor(name).to(dtype) if plain else file.get_tensor(name)
    found = model.load_state_dict(state, strict=False, assign=True)
    # AutoGPTQ writes a bias of zeros for layers that have none
    missing = [name for name in found.missing_keys if not name.startswith(computed)]
    unexpected = [name for name in found.unexpected_keys if not name.endswith(".bias") or state[name].any()]
    if missing or unexpected:
        raise ValueError(
            f"{folder} holds other GPTQ weights than the model's: missing {missing[:2]}, unknown {unexpected[:2]}"
        )

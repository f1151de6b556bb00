"""Anchors that take less device memory: kept in fewer bits, or in host memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

ANCHOR_DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}
ANCHOR_DEVICES = ("cpu",)


@dataclass(frozen=True)
class PackedAnchor:
    """A feature that is kept in another dtype or on another device than it was computed.

    Attributes:
        data: the feature in another dtype or on another device.
        scale: scale of fp8, whose largest number is 448: the feature is data times scale; None is 1.
        dtype, device: dtype and device of the feature.
    """

    data: Tensor
    scale: Tensor | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, feature: Tensor, dtype: str | None, device: str | None) -> "PackedAnchor":
        """Pack a feature.

        Args:
            dtype: one of ANCHOR_DTYPES; None is the feature's.
            device: "cpu" is host memory, pinned if the feature comes from CUDA, so that the host need not wait for
                copies in either direction; None is the feature's.
        """
        data, scale = feature, None
        if dtype is not None:
            kind = ANCHOR_DTYPES[dtype]
            if kind == torch.float8_e4m3fn:
                scale = feature.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
                scale = scale / torch.finfo(kind).max
                data = (feature.float() / scale).to(kind)
            else:
                data = feature.to(kind)
        if device is not None and data.device.type != device:
            pinned = torch.empty(data.shape, dtype=data.dtype, device=device, pin_memory=data.device.type == "cuda")
            data = pinned.copy_(data, non_blocking=True)
        if data is feature:
            data = feature.clone(memory_format=torch.contiguous_format)  # a view would keep its whole base tensor
        return cls(data, scale, feature.dtype, feature.device)

    @property
    def shape(self) -> torch.Size:
        """Shape of the feature."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the kept data."""
        return self.data.nbytes

    def unpack(self) -> Tensor:
        """The feature on its device, rounded as it was kept; in fp32 if it was kept in fp8."""
        data = self.data.to(self.device, non_blocking=True)
        return data if self.scale is None else data.float() * self.scale

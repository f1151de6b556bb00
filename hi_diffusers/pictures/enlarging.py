"""Enlarges pictures: by Lanczos' filter, or by a super-resolution network that spandrel can read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FACTORS = (2, 4)
TILE, MARGIN = 256, 16  # pixels that the network sees at once, and of them those around a tile that are cut off again


class Enlarger:
    """Enlarges pictures.

    Args:
        network: .safetensors or .pth file of a super-resolution network; None: Lanczos' filter.
        device: device of the network.

    Raises:
        ValueError: if the file holds no network that enlarges RGB pictures.
    """

    def __init__(self, network: Path | None = None, device: str | torch.device = "cpu"):
        self.method = "Lanczos" if network is None else network.stem
        self._device = torch.device(device)
        self._network: Any = None if network is None else _read(network, self._device)

    def __call__(self, image: Image.Image, factor: int) -> Image.Image:
        """Enlarge an RGB picture.

        Args:
            factor: one of FACTORS. A network of another scale is applied until the picture is large enough, and the
                rest is Lanczos'.
        """
        if factor not in FACTORS:
            raise ValueError(f"factor must be one of {FACTORS}, got {factor}")
        width, height = image.width * factor, image.height * factor
        while self._network is not None and image.width < width:
            image = _to_image(enlarge_tiled(self._apply, self._network.scale, _to_tensor(image)))
        return image.resize((width, height), Image.Resampling.LANCZOS)

    def _apply(self, tile: Tensor) -> Tensor:
        enlarged: Tensor = self._network(tile.to(self._device))
        return enlarged.cpu()


@torch.inference_mode()
def enlarge_tiled(network: Callable[[Tensor], Tensor], scale: int, pixels: Tensor) -> Tensor:
    """Apply a network tile by tile, so that its memory does not grow with the picture.

    Args:
        network: [1,3,h,w] in 0..1 -> [1,3,h*scale,w*scale].
        pixels: [3,H,W], fp32 in 0..1.

    Returns:
        [3,H*scale,W*scale]
    """
    _, height, width = pixels.shape
    enlarged = pixels.new_empty(3, height * scale, width * scale)
    step = TILE - 2 * MARGIN
    for top in range(0, height, step):
        for left in range(0, width, step):
            bottom, right = min(top + step, height), min(left + step, width)
            above, before = max(0, top - MARGIN), max(0, left - MARGIN)
            tile = pixels[:, above : bottom + MARGIN, before : right + MARGIN]
            drawn = network(tile[None])[0].clamp(0, 1)
            rows = slice((top - above) * scale, (bottom - above) * scale)
            columns = slice((left - before) * scale, (right - before) * scale)
            enlarged[:, top * scale : bottom * scale, left * scale : right * scale] = drawn[:, rows, columns]
    return enlarged


def _read(file: Path, device: torch.device) -> Any:
    import spandrel  # type: ignore[import-not-found, unused-ignore]

    try:
        network = spandrel.ModelLoader(device).load_from_file(file)
    except Exception as error:  # a file of any kind raises any exception
        raise ValueError(f"upscaler {file} cannot be read: {' '.join(str(error).split())}") from error
    channels = (getattr(network, "input_channels", 0), getattr(network, "output_channels", 0))
    if not isinstance(network, spandrel.ImageModelDescriptor) or channels != (3, 3) or network.scale < 2:
        raise ValueError(f"upscaler {file} must enlarge RGB pictures; it is a network for {network.purpose}")
    return network.eval()


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def _to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())

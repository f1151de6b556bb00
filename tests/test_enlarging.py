"""Pictures that are enlarged."""

import numpy as np
import pytest
import torch
from PIL import Image

from hi_diffusers.pictures.enlarging import MARGIN, TILE, Enlarger, enlarge_tiled


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("factor", [2, 4])
def test_without_a_network_it_is_lanczos(factor):
    image = picture(24, 16)
    enlarged = Enlarger()(image, factor)
    assert enlarged.size == (24 * factor, 16 * factor)
    assert enlarged.tobytes() == image.resize(enlarged.size, Image.Resampling.LANCZOS).tobytes()
    with pytest.raises(ValueError, match="factor must be one of"):
        Enlarger()(image, 3)


def test_tiles_join_without_a_seam():
    """A network whose field of view is smaller than the margin draws the same tile by tile as in one piece."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 2 * MARGIN - 1, padding=MARGIN - 1), torch.nn.Conv2d(8, 12, 1), torch.nn.PixelShuffle(2)
    )
    pixels = torch.rand(3, TILE + 77, 2 * TILE + 9)
    with torch.inference_mode():
        whole = network(pixels[None])[0].clamp(0, 1)
    torch.testing.assert_close(enlarge_tiled(network, 2, pixels), whole, atol=1e-5, rtol=0)


@pytest.fixture
def networks(tmp_path):
    """Files of small networks of random weights that enlarge 2 and 4 times, and of one that does not enlarge."""
    spandrel = pytest.importorskip("spandrel", reason="spandrel (with a torchvision of torch's build) is not installed")
    from safetensors.torch import save_file
    from spandrel.architectures.ESRGAN import ESRGAN

    assert spandrel.__version__
    torch.manual_seed(0)
    for scale in (1, 2, 4):
        network = ESRGAN(num_filters=8, num_blocks=1, scale=scale)
        save_file(network.state_dict(), tmp_path / f"x{scale}.safetensors")
        torch.save(network.state_dict(), tmp_path / f"x{scale}.pth")
    (tmp_path / "none.pth").write_bytes(b"no network")
    return tmp_path


def test_a_network_of_any_scale_enlarges_by_what_was_asked(networks):
    image = picture(40, 24)
    for suffix in ("safetensors", "pth"):
        for scale in (2, 4):
            enlarger = Enlarger(networks / f"x{scale}.{suffix}")
            assert enlarger.method == f"x{scale}"
            for factor in (2, 4):
                enlarged = enlarger(image, factor)
                assert enlarged.size == (40 * factor, 24 * factor)
                assert enlarged.tobytes() != Enlarger()(image, factor).tobytes()


def test_what_does_not_enlarge_is_refused(networks):
    with pytest.raises(ValueError, match="must enlarge RGB pictures"):
        Enlarger(networks / "x1.safetensors")
    with pytest.raises(ValueError, match=r"none\.pth cannot be read"):
        Enlarger(networks / "none.pth")

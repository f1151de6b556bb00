"""Pictures to start from: what is read, how it is fitted, and what is refused with one sentence."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from hi_diffusers.pictures import inputs
from hi_diffusers.pictures.inputs import InputPicture, check_mask, check_white, decode_picture, read_picture

RED = (200, 30, 10)


def saved(path: Path, picture: Image.Image, **settings: Any) -> Path:
    picture.save(path, **settings)
    return path


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("RGB", (32, 32), RED), RED),
        (Image.new("RGB", (32, 32), RED).quantize(4), RED),
        (Image.new("L", (32, 32), 77), (77, 77, 77)),
        (Image.new("1", (32, 32), 1), (255, 255, 255)),
        (Image.fromarray(np.full((32, 32), 77 * 256 + 255, np.uint16)), (78, 78, 78)),
        (Image.new("RGBA", (32, 32), (*RED, 0)), (255, 255, 255)),
        (Image.new("RGBA", (32, 32), (*RED, 255)), RED),
        (Image.new("LA", (32, 32), (50, 0)), (255, 255, 255)),
    ],
    ids=["rgb", "palette", "grey", "one bit", "16 bits", "transparent", "opaque", "grey and transparent"],
)
def test_every_kind_of_picture_becomes_rgb(
    picture: Image.Image, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    found, _ = read_picture(saved(tmp_path / "a.png", picture))
    assert found.mode == "RGB"
    assert np.abs(np.array(found.getpixel((0, 0)), int) - expected).max() <= 6  # a palette's colours are rounded


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), RED).convert("CMYK")
    found, _ = read_picture(saved(tmp_path / "a.jpg", picture, quality=95))
    assert found.mode == "RGB" and np.abs(np.array(found.getpixel((5, 5)), int) - RED).max() < 20


def test_a_mask_is_black_where_it_is_transparent(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGBA", (32, 32), (255, 255, 255, 0)))
    assert read_picture(path, "mask_image")[0].getpixel((0, 0)) == (0, 0, 0)


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: 90 degrees clockwise
    picture = InputPicture.of(saved(tmp_path / "a.jpg", Image.new("RGB", (64, 32), RED), exif=exif))
    assert (picture.width, picture.height) == (32, 64)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", "must be a PNG, JPEG or WebP picture"),
        ("a.png", b"P6 32 32 255 " + b"\0" * 3072, "must be a PNG, JPEG or WebP picture"),
        ("a.png", b"GIF89a" + b"\0" * 64, "must be a PNG, JPEG or WebP picture"),
        ("a.svg", b"<svg/>", "must be a PNG, JPEG or WebP picture"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_picture(tmp_path / name)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says its size and holds these chunks, and no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        whole += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return whole


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(ValueError, match="image given cannot be read as a picture"):
        decode_picture(png(60_000, 50_000))
    with pytest.raises(ValueError, match="image given has 12000x9000 pixels, 100000000 are allowed"):
        decode_picture(png(12_000, 9_000))


def test_a_text_that_unpacks_to_a_gigabyte_is_refused() -> None:
    bomb = b"Comment\0\0" + zlib.compress(b"\0" * (PngImagePlugin.MAX_TEXT_CHUNK + 1))
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        decode_picture(png(32, 32, (b"zTXt", bomb)))


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for suffix in ("png", "jpg", "webp"):
        whole = saved(tmp_path / f"a.{suffix}", noise).read_bytes()
        (tmp_path / f"b.{suffix}").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"image .*b\.\w+ (cannot be read as|must be) a"):
            read_picture(tmp_path / f"b.{suffix}")


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_several_frames_are_refused(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    path = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="has several frames, and one picture is needed"):
        read_picture(path)


def test_small_pictures_missing_files_and_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 8x32 pixels; both sides need 16"):
        read_picture(saved(tmp_path / "a.png", Image.new("RGB", (8, 32))))
    with pytest.raises(ValueError, match=r"image must be a PNG, JPEG or WebP picture, got .*b\.png: No such file"):
        read_picture(tmp_path / "b.png")
    with pytest.raises(ValueError, match="must be a file of at most"):
        read_picture(Path("/dev/zero"))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="must be a file of at most"):
        read_picture(saved(tmp_path / "a.png", Image.effect_noise((64, 64), 50)))


# What is kept of it.


def test_equal_contents_are_equal_pictures(tmp_path: Path) -> None:
    one = saved(tmp_path / "a.png", Image.new("RGB", (32, 32), RED))
    other = tmp_path / "b.png"
    other.write_bytes(one.read_bytes())
    assert InputPicture.of(one) == InputPicture.of(other)
    assert InputPicture.of(one) != InputPicture.of(Image.new("RGB", (32, 32), "blue"))


def test_a_file_that_was_changed_is_not_drawn_from(tmp_path: Path) -> None:
    picture = InputPicture.of(saved(tmp_path / "a.png", Image.new("RGB", (32, 32), RED)))
    saved(tmp_path / "a.png", Image.new("RGB", (32, 32), "blue"))
    with pytest.raises(ValueError, match=r"image .*a\.png was changed since it was checked"):
        picture.pixels()


# How it is fitted.


def halves(width: int, height: int) -> InputPicture:
    """Black on the left, white on the right, with a red frame of one eighth above and below."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = 255
    pixels[: height // 8] = pixels[-height // 8 :] = RED
    return InputPicture.of(Image.fromarray(pixels))


def test_cover_cuts_what_stands_over_evenly() -> None:
    fitted = halves(64, 128).fitted(64, 64, "cover")
    assert fitted.shape == (64, 64, 3) and fitted.dtype == np.float32
    assert (fitted[:, :30] < 0.1).all() and (fitted[:, 34:] > 0.9).all()  # the frame is cut off


def test_pad_keeps_everything_between_black_bars() -> None:
    fitted = halves(64, 128).fitted(64, 64, "pad")
    assert (fitted[:, :15] == 0).all() and (fitted[:, 49:] == 0).all()
    assert np.abs(fitted[0, 32] * 255 - RED).max() < 8


def test_a_picture_of_the_right_size_keeps_its_bits() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    fitted = InputPicture.of(Image.fromarray(noise)).fitted(64, 64, "cover")
    assert np.array_equal((fitted * 255).round().astype(np.uint8), noise)


# Masks.


def mask(width: int = 32, height: int = 32, level: int = 255) -> InputPicture:
    return InputPicture.of(Image.new("L", (width, height), level), "mask_image")


def test_a_mask_of_another_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match="mask_image must have the image's size 64x64, got 32x16"):
        check_mask((64, 64), mask(32, 16).size)


def test_a_black_mask_and_a_mask_without_a_picture_are_refused() -> None:
    with pytest.raises(ValueError, match="mask_image is black everywhere"):
        check_white(mask(level=0).fitted(32, 32, "cover"))
    with pytest.raises(ValueError, match="mask_image has no effect without an image"):
        check_mask(None, mask().size)


def test_a_masks_black_stays_black_at_another_size() -> None:
    """A sharp filter rings: black pixels would be drawn in part."""
    half = Image.new("L", (100, 100))
    half.paste(255, (50, 0, 100, 100))
    fitted = InputPicture.of(half, "mask_image").fitted(64, 64, "cover")
    assert (fitted[:, :31] == 0).all() and (fitted[:, 33:] == 1).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"must have 8 or 16 bits, got a picture of mode {mode}"):
        InputPicture.of(Image.new(mode, (32, 32), 200))


def test_a_stream_of_bytes_is_read_as_a_file_is() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), RED).save(stream, "PNG")
    assert decode_picture(stream.getvalue()).getpixel((0, 0)) == RED

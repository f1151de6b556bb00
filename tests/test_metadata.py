import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from hi_diffusers.pictures import metadata as module
from hi_diffusers.pictures.metadata import parameters_text, read_metadata, write_picture
from hi_diffusers.request.options import SamplingOptions

SUFFIXES = (".png", ".jpg", ".webp")


def made(prompt: str = "a red circle", **options: object) -> dict:
    return {
        "version": 1,
        "software": "hi-diffusers 0.1.0",
        "model": {"model_type": "nano", "sha256": "ab" * 32},
        "options": {
            "prompt": prompt,
            "negative_prompt": "",
            "seed": 2**63 + 1,
            "width": 64,
            "height": 48,
            "num_steps": 50,
            "guidance": 5.0,
            "scheduler": "unipc",
            "shift": 3.0,
        }
        | options,
        "cache": {"target": "module", "basis": "taylor", "fresh_threshold": 4, "full_steps": None},
        "versions": {"torch": "2.13.0"},
    }


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 48)).convert("RGB")


def png_with(path: Path, text: str, keyword: str = "hi_diffusers", compressed: bool = False) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(keyword, text, zip=compressed)
    picture().save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "prompt",
    [
        "plain",
        "",
        "红色的圆形",
        "🎨👩‍🚀 emoji",
        "two\nlines\r\n\ttabbed",
        'q"uo\\tes',
        "Negative prompt: x, Steps: 1",
        "\0\x1f",
    ],
)
def test_metadata_comes_back_as_it_was(tmp_path: Path, suffix: str, prompt: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_picture(picture(), path, made(prompt))
    assert read_metadata(path) == made(prompt)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_picture_and_metadata_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    write_picture(picture(), first, made())
    write_picture(picture(), second, read_metadata(first))
    assert first.read_bytes() == second.read_bytes()


def test_a_png_keeps_every_pixel(tmp_path: Path) -> None:
    write_picture(picture(), tmp_path / "a.png", made())
    assert Image.open(tmp_path / "a.png").tobytes() == picture().tobytes()


def test_a_format_that_is_given_overrides_the_suffix(tmp_path: Path) -> None:
    write_picture(picture(), tmp_path / "a.part", made(), format="WEBP")
    assert Image.open(tmp_path / "a.part").format == "WEBP"
    assert read_metadata(tmp_path / "a.part") == made()


def test_a_lower_quality_makes_a_smaller_file(tmp_path: Path) -> None:
    for suffix in (".jpeg", ".webp"):
        write_picture(picture(), tmp_path / f"low{suffix}", made(), quality=20)
        write_picture(picture(), tmp_path / f"high{suffix}", made(), quality=100)
        assert (tmp_path / f"low{suffix}").stat().st_size < (tmp_path / f"high{suffix}").stat().st_size


# The form that other software reads.


def test_a_png_carries_the_customary_parameters_text(tmp_path: Path) -> None:
    write_picture(picture(), tmp_path / "a.png", made("a 🐈\non a mat", negative_prompt="blurry"))
    assert Image.open(tmp_path / "a.png").info["parameters"] == (
        "a 🐈\non a mat\n"
        "Negative prompt: blurry\n"
        "Steps: 50, Sampler: unipc, CFG scale: 5.0, Seed: 9223372036854775809, Size: 64x48, Shift: 3.0, "
        'Model: nano, Cache: "target: module, basis: taylor, fresh_threshold: 4", Version: hi-diffusers 0.1.0'
    )


def test_parameters_leave_out_what_is_not_known() -> None:
    assert parameters_text({"version": 1, "prompt": "x", "options": {"num_steps": 4}}) == "x\nSteps: 4"


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_exif_names_software_make_and_model(tmp_path: Path, suffix: str) -> None:
    write_picture(picture(), tmp_path / f"a{suffix}", made())
    exif = Image.open(tmp_path / f"a{suffix}").getexif()
    tags = (ExifTags.Base.Software, ExifTags.Base.Make, ExifTags.Base.Model)
    assert [exif[tag] for tag in tags] == ["hi-diffusers 0.1.0", "hi-diffusers", "nano"]


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_the_user_comment_has_the_type_and_code_that_exif_prescribes(tmp_path: Path, suffix: str) -> None:
    """Pillow writes bytes as BYTE; readers that insist on UNDEFINED get a list of numbers for a text then."""
    write_picture(picture(), tmp_path / f"a{suffix}", made("红"))
    data = (tmp_path / f"a{suffix}").read_bytes()
    exif = data[data.index(b"MM\0*") :]
    tag, kind, count, offset = struct.unpack_from(">HHII", exif, exif.index(b"\x92\x86\0"))
    assert (tag, kind) == (ExifTags.Base.UserComment, 7)
    comment = exif[offset : offset + count]
    assert comment.startswith(b"UNICODE\0")
    assert comment[8:].decode("utf-16-be") == parameters_text(made("红"))


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize("text", ["红" * 9_990, "🐈" * 7_490, '"' * 9_999, "x" * 10_000])
def test_the_longest_prompts_fit(tmp_path: Path, text: str, suffix: str) -> None:
    options = SamplingOptions(prompt=text, negative_prompt=text)
    metadata = made(options.prompt, negative_prompt=options.negative_prompt)
    write_picture(picture(), tmp_path / f"a{suffix}", metadata)
    assert read_metadata(tmp_path / f"a{suffix}") == metadata


# Whole or not at all.


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        write_picture(picture(), path, made())
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == b"old"


def test_an_existing_file_is_replaced_with_ordinary_permissions(tmp_path: Path) -> None:
    path, ordinary = tmp_path / "a.png", tmp_path / "ordinary"
    path.write_bytes(b"old")
    ordinary.touch()
    write_picture(picture(), path, made())
    assert read_metadata(path) == made()
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_a_missing_folder_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_picture(picture(), tmp_path / "none" / "a.png", made())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("image", "name", "metadata", "settings", "said"),
    [
        (picture().convert("RGBA"), "a.png", made(), {}, "mode RGBA"),
        (picture(), "a.gif", made(), {}, r"'\.gif'; allowed are \.png"),
        (picture(), "a", made(), {}, "suffix ''"),
        (picture(), "a.png", made(), {"format": "BMP"}, "'BMP'; PNG, JPEG"),
        (picture(), "a.jpg", made(), {"quality": 0}, "quality is 0"),
        (picture(), "a.png", made() | {"version": 2}, {}, "version 2"),
        (picture(), "a.png", made(guidance=float("nan")), {}, "JSON"),
        (picture(), "a.png", made(seed=object()), {}, "JSON"),
        (picture(), "a.png", made("half a pair: \ud83c"), {}, "JSON"),
        (picture(), "a.png", made("x" * 1_000_000), {}, "1000000 are allowed"),
        (picture(), "a.jpg", made("x" * 40_000), {}, "a JPEG can hold 65533"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, image: Image.Image, name: str, metadata: dict, settings: dict, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        write_picture(image, tmp_path / name, metadata, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_webp_holds_what_a_jpeg_cannot(tmp_path: Path) -> None:
    write_picture(picture(), tmp_path / "a.webp", made("x" * 40_000))
    assert read_metadata(tmp_path / "a.webp") == made("x" * 40_000)


# Files that come from anybody.


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_metadata(tmp_path / "none.png")


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    for name, data in {
        "empty": b"",
        "text": b"hello",
        "png": b"\x89PNG\r\n\x1a\n",
        "webp": b"RIFF\4\0\0\0WEBP",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is not a readable PNG, JPEG or WebP picture"):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_without_metadata_is_refused(tmp_path: Path, suffix: str) -> None:
    picture().save(tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match="no hi-diffusers metadata"):
        read_metadata(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize("note", [b"ASCII\0\0\0{}", b"UNICODE\0\0H\0i", b"hi_diffusers", b"", b"{}"])
def test_a_camera_s_comment_is_not_ours(tmp_path: Path, note: bytes, suffix: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = note
    picture().save(tmp_path / f"a{suffix}", exif=exif, comment=note)
    with pytest.raises(ValueError, match="no hi-diffusers metadata"):
        read_metadata(tmp_path / f"a{suffix}")


def test_other_software_s_png_text_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no hi-diffusers metadata"):
        read_metadata(png_with(tmp_path / "a.png", "a cat\nSteps: 20", keyword="parameters"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '"text"',
        '{"version": 1, "options": {"guidance": NaN}}',
        '{"version": 1, "options": {"guidance": 1e999}}',
        '{"version": 1, "options": {"prompt": "\\ud800"}}',
        '{"version": 1, "options": []}',
        '{"version": 1, "model": "nano"}',
        '{"version": 1, "seed": ' + "1" * 5000 + "}",
        "[" * 100_000,
    ],
)
def test_malformed_metadata_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="malformed"):
        read_metadata(png_with(tmp_path / "a.png", text))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_metadata_of_another_version_is_refused(tmp_path: Path, version: object) -> None:
    with pytest.raises(ValueError, match="another version; this software reads version 1"):
        read_metadata(png_with(tmp_path / "a.png", json.dumps({"version": version})))


def test_oversized_metadata_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"version": 1, "prompt": "x" * 1_000_001})
    with pytest.raises(ValueError, match="1000000 are allowed"):
        read_metadata(png_with(tmp_path / "plain.png", text))
    with pytest.raises(ValueError):  # a few kilobytes that would grow to a megabyte and more
        read_metadata(png_with(tmp_path / "bomb.png", text, compressed=True))


def test_an_oversized_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(picture(), tmp_path / "a.png", made())
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="the limit for a picture"):
        read_metadata(tmp_path / "a.png")


def test_pixels_are_not_decoded(tmp_path: Path) -> None:
    """A picture whose pixel data is garbage still tells what made it."""
    path = tmp_path / "a.png"
    write_picture(picture(), path, made())
    data = path.read_bytes()
    start = data.index(b"IDAT")
    path.write_bytes(data[:start] + b"IDAT" + b"garbage" * 3)
    assert read_metadata(path) == made()


def test_a_picture_that_claims_a_billion_pixels_is_refused(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with pytest.raises(ValueError, match="not a readable"):
        read_metadata(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file_gives_its_metadata_or_a_sentence(tmp_path: Path, suffix: str) -> None:
    """Cut, or with a byte flipped, at every 7th place: a ValueError or a dictionary, nothing else."""
    path = tmp_path / f"a{suffix}"
    write_picture(picture(), path, made())
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[place] ^= 0xFF
        for damaged in (data[:place], bytes(flipped)):
            path.write_bytes(damaged)
            try:
                assert isinstance(read_metadata(path), dict)
            except ValueError as error:
                assert str(path) in str(error)

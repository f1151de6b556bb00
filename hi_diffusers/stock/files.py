"""The files of a picture or a video, with their metadata.

A picture carries its settings as ours do. A video is an .mp4, or an animated lossless .webp; its settings lie beside it
in NAME.json, with the SHA-256 of its frames, which does not depend on how they are encoded.
"""

import hashlib
import io
import json
import tempfile
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hi_diffusers.pictures.metadata import FORMATS, encode_picture, write_atomically
from hi_diffusers.stock.drawing import StockResult
from hi_diffusers.stock.formats import VIDEOS

CRF = 17  # x264: visually lossless


def frames_sha256(result: StockResult) -> str:
    """The SHA-256 of all 8-bit pixels, frame after frame."""
    digest = hashlib.sha256()
    for frame in result.frames:
        digest.update(np.asarray(frame).tobytes())
    return digest.hexdigest()


def encode_result(result: StockResult, suffix: str, *, embed: bool = True) -> bytes:
    """The bytes of a picture's or a video's file.

    Args:
        suffix: as `check_suffix` allows it.
        embed: whether a picture carries all its settings.
    """
    if not result.is_video:
        return encode_picture(result.frames[0], result.metadata, FORMATS[suffix], embed=embed)
    fps = int(result.metadata["options"]["fps"])
    return _mp4(result.frames, fps) if suffix == ".mp4" else _webp(result.frames, fps)


def files_beside(result: StockResult, path: Path) -> dict[Path, bytes]:
    """The files beside a video: its settings, and its sound."""
    if not result.is_video:
        return {}
    settings = {**result.metadata, "frames": len(result.frames), "frames_sha256": frames_sha256(result)}
    text = json.dumps(settings, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    files = {path.with_name(f"{path.name}.json"): text.encode()}
    if result.audio is not None:
        files[path.with_suffix(".wav")] = _wav(result.audio, result.audio_rate)
    return files


def write_result(result: StockResult, path: Path, *, replace: bool = True) -> bool:
    """Write a picture, or a video and what lies beside it; whether this call wrote it, as `write_atomically`."""
    data = encode_result(result, path.suffix.lower())
    if replace and path.suffix.lower() in VIDEOS:  # settings of what was there before must not be taken for these
        path.with_name(f"{path.name}.json").unlink(missing_ok=True)
    written = write_atomically(path, data, replace=replace)
    if written:
        for name, data in files_beside(result, path).items():
            write_atomically(name, data)
    return written


def _webp(frames: Sequence[Image.Image], fps: int) -> bytes:
    encoded = io.BytesIO()
    frames[0].save(
        encoded,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 / fps),
        loop=0,
        lossless=True,
        minimize_size=False,
        kmax=1,  # every frame whole: pixels under transparent parts would not come back otherwise
    )
    return encoded.getvalue()


def _mp4(frames: Sequence[Image.Image], fps: int) -> bytes:
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(path),
            frames[0].size,
            fps=fps,
            codec="libx264",
            macro_block_size=2,
            output_params=["-crf", str(CRF), "-threads", "1", "-fflags", "+bitexact", "-movflags", "+faststart"],
        )
        writer.send(None)
        try:
            for frame in frames:
                writer.send(np.ascontiguousarray(frame))
        finally:
            writer.close()
        return path.read_bytes()


def _wav(audio: np.ndarray, rate: int) -> bytes:
    """A WAV file, 16 bits, of [channels, samples] in -1..1."""
    encoded = io.BytesIO()
    samples = (np.atleast_2d(audio).clip(-1, 1) * 32767).round().astype("<i2")
    with wave.open(encoded, "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.T.tobytes())
    return encoded.getvalue()

"""Every reader of files and requests that others may have written, with inputs that it accepts."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from cache_functions import CacheConfig, CalibrationShelf, Sampler, resolve
from cache_functions.calibration import Calibration
from hi_diffusers import HiDreamImageTransformer2DModel, SamplingOptions
from hi_diffusers.calibrating.solving import solver_of_line
from hi_diffusers.calibrating.trials import psnr_of, read_lines
from hi_diffusers.calibrating.work import WorkFolder
from hi_diffusers.commands.like import Like
from hi_diffusers.demo.settings import values_of
from hi_diffusers.engine.embeds import EmbedsCache
from hi_diffusers.families.hidream.files import transformer_shapes
from hi_diffusers.families.hidream.prompts import PromptEmbeds
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.inputs import FITS, InputPicture
from hi_diffusers.pictures.metadata import read_metadata, write_picture
from hi_diffusers.request.drawing import decide
from hi_diffusers.runs.comparison import Run, compare_pairs, match
from hi_diffusers.runs.manifest import Manifest, finished, read_run
from hi_diffusers.runs.prompt_files import PromptFile
from hi_diffusers.runs.scores import read_scores
from hi_diffusers.runs.units import Numbering, Shard
from hi_diffusers.service.offered import OfferedModel, offer_models
from hi_diffusers.service.requests import Limits, check
from hi_diffusers.weights.headers import check_shapes, check_transformer_file
from hi_diffusers.weights.lora import check_lora, read_lora
from hi_diffusers.weights.source import ModelSource
from tests.fuzz.mutate import dumped, mutate_bytes, mutate_json

Feed = Callable[[Random], None]
LAYER = "double_stream_blocks.0.block.attn1.to_q"


@dataclass
class Place:
    """What readers are made in.

    Attributes:
        folder: an empty folder.
        tiny: a model's folder, which must stay as it is.
    """

    folder: Path
    tiny: Path


def safetensors_header(place: Place) -> Feed:
    """A transformer in one file, scales included, as --transformer takes it."""
    weights = load_file(next((place.tiny / "transformer").glob("*.safetensors")))
    weights[f"{LAYER}.weight"] = weights[f"{LAYER}.weight"].to(torch.float8_e4m3fn)
    weights |= {f"{LAYER}.scale_weight": torch.tensor(1.0), "scaled_fp8": torch.zeros(0)}
    weights[f"{LAYER}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    path = place.folder / "a.safetensors"
    save_file(weights, path, {"_quantization_metadata": json.dumps({"layers": {LAYER: {"format": "float8_e4m3fn"}}})})
    data, shapes = path.read_bytes(), transformer_shapes(place.tiny)

    def feed(rng: Random) -> None:
        path.write_bytes(mutate_safetensors(data, rng))
        check_transformer_file(path)
        check_shapes(path, shapes)
        HiDreamImageTransformer2DModel.from_single_file(path, config=place.tiny / "transformer")

    return feed


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """Changed bytes, or a changed header of the right length."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = dumped(mutate_json(json.loads(data[8 : 8 + length]), rng))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def gguf_header(place: Place) -> Feed:
    """A transformer in a GGUF file."""
    import gguf

    path = place.folder / "a.gguf"
    writer = gguf.GGUFWriter(path, arch="hidream")
    for name, tensor in load_file(next((place.tiny / "transformer").glob("*.safetensors"))).items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()

    def feed(rng: Random) -> None:
        path.write_bytes(mutate_bytes(data, rng))
        check_transformer_file(path)
        HiDreamImageTransformer2DModel.from_single_file(path, config=place.tiny / "transformer")

    return feed


def lora(place: Place) -> Feed:
    """A LoRA."""
    shapes, path = transformer_shapes(place.tiny), place.folder / "a.safetensors"
    outputs, inputs = shapes[f"{LAYER}.weight"]
    parts = {
        "lora_A.weight": torch.ones(2, inputs),
        "lora_B.weight": torch.ones(outputs, 2),
        "alpha": torch.tensor(1.0),
    }
    settings = {
        "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {LAYER: 2}})
    }
    save_file({f"transformer.{LAYER}.{end}": tensor for end, tensor in parts.items()}, path, settings)
    data = path.read_bytes()

    def feed(rng: Random) -> None:
        path.write_bytes(mutate_safetensors(data, rng))
        read_lora(path, check_lora(path, shapes))

    return feed


def calibration(place: Place) -> Feed:
    """A calibration in a searched folder: of forecasts, or of solvers."""
    folder, path = Path(PRESETS["nano"].folder or "") / "calibration", place.folder / "a.json"
    shipped = [
        json.loads((folder / f"nano-unipc50-guidance2-{target}.json").read_text()) for target in ("x0", "solver")
    ]
    key = shipped[0]["key"]
    sampler = Sampler(
        "a sampler", key["scheduler"], key["num_steps"], key["shift"], key["guidance"], False, has_branches=True
    )

    def feed(rng: Random) -> None:
        content = rng.choice(shipped)
        whole = json.dumps(content).encode()
        path.write_bytes(mutate_bytes(whole, rng) if rng.random() < 0.3 else dumped(mutate_json(content, rng)))
        shelf = CalibrationShelf(key["model"], (place.folder,))
        resolve(CacheConfig.best(13), sampler, shelf)  # a fault is a notice here
        Calibration.read(path)

    return feed


def embeddings(place: Place) -> Feed:
    """An entry of the embeddings cache; whatever is wrong, it is made again."""
    whole = PromptEmbeds(torch.randn(1, 8, 4), torch.randn(2, 1, 8, 4), torch.randn(1, 4))
    cache = EmbedsCache(place.folder / "embeds", PromptEmbeds, 8)
    cache.get(["a"], lambda _: whole, torch.device("cpu"))
    cache.fill(["a"], lambda _: whole)
    (path,) = (place.folder / "embeds").glob("*.safetensors")
    data = path.read_bytes()

    def feed(rng: Random) -> None:
        path.write_bytes(mutate_safetensors(data, rng))
        found = cache.get(["a"], lambda _: whole, torch.device("cpu"))
        if not torch.equal(found.llama, whole.llama):
            raise AssertionError("it was drawn from")

    return feed


def metadata(place: Place) -> Feed:
    """A picture for --like and for the page."""
    pipe_metadata = {
        "version": 1,
        "model": {"model_type": "nano", "transformer": "abc", "llama": None},
        "options": {"prompt": "a", "negative_prompt": "", "seed": 7, "width": 64, "height": 64, "num_steps": 50}
        | {"guidance": 2.0, "scheduler": "unipc", "shift": 3.0, "max_sequence_length": 32},
        "cache": {name: value for name, value in CacheConfig(target="x0").settings().items()},
        "versions": {"torch": "2"},
    }
    image = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    models, limits = offer_models("nano", ModelSource(), None), Limits()

    def feed(rng: Random) -> None:
        path = place.folder / f"a{rng.choice(('.png', '.jpg', '.webp'))}"
        if rng.random() < 0.5:
            write_picture(image, path, pipe_metadata)
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        else:
            path = path.with_suffix(".png")
            chunks = PngImagePlugin.PngInfo()
            chunks.add_itxt("hi_diffusers", dumped(mutate_json(pipe_metadata, rng)).decode(), zip=rng.random() < 0.5)
            image.save(path, pnginfo=chunks)
        faults = []
        for read in (read_as_like, lambda path: values_of(read_metadata(path), limits, models)):
            try:
                read(path)
            except Exception as error:  # the first one that is no sentence is raised below
                faults.append(error)
        if faults:
            raise next((fault for fault in faults if type(fault) is not ValueError), faults[0])

    return feed


def read_as_like(path: Path) -> None:
    """Take a picture's settings as inference.py does."""
    like = Like.read(path)
    preset = PRESETS[like.model_type()]
    options = SamplingOptions(**({"prompt": like.prompt(preset.example)} | like.options()))
    decide(preset, options, like.cache(preset, False, None), None)


def input_picture(place: Place) -> Feed:
    """A picture to start from, and a mask: every format and kind, with EXIF, transparency and text."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 4), np.uint8)
    whole, exif, text = Image.fromarray(noise), Image.Exif(), PngImagePlugin.PngInfo()
    exif[274] = 6
    text.add_itxt("Comment", "x" * 2000, zip=True)
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("png", whole, {"pnginfo": text}),
        ("png", whole.convert("P"), {"transparency": 3}),
        ("png", Image.fromarray(noise[..., 0].astype(np.uint16) * 257), {}),
        ("jpg", whole.convert("RGB"), {"exif": exif}),
        ("jpg", whole.convert("RGB").convert("CMYK"), {}),
        ("webp", whole, {"exif": exif}),
    ]
    contents = []
    for number, (suffix, picture, settings) in enumerate(kinds):
        path = place.folder / f"{number}.{suffix}"
        picture.save(path, **settings)
        InputPicture.of(path)
        contents.append(path.read_bytes())

    def feed(rng: Random) -> None:
        path = place.folder / "changed.png"
        path.write_bytes(mutate_bytes(rng.choice(contents), rng))
        InputPicture.of(path, rng.choice(("image", "mask_image"))).fitted(64, 64, rng.choice(FITS))

    return feed


def run_folder(place: Place) -> Feed:
    """A run's folder, resumed and compared."""
    run = {"fixed": {"model": "nano", "seed": 0, "cache": {"full_steps": 13}, "threads": 1}, "first": {"software": "a"}}
    line = {
        "index": 0,
        "image": 0,
        "seed": 7,
        "bytes": 9,
        "prompt": "a",
        "file": "00000_00.png",
        "sha256": "00",
        "time": 1.0,
    }
    lines = [line | {"index": n, "file": f"{n:05d}_00.png", "options": {"width": 64}, "seconds": 1.5} for n in range(3)]
    folder, numbering = place.folder / "run", Numbering(3, 1, 0, ".png", 1)
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number:05d}_00.png")

    def feed(rng: Random) -> None:
        whole = [dumped(one) for one in (run, *lines)]
        changed = rng.randrange(4)
        one = (run, *lines)[changed]
        whole[changed] = mutate_bytes(whole[changed], rng) if rng.random() < 0.3 else dumped(mutate_json(one, rng))
        (folder / "run.json").write_bytes(whole[0])
        (folder / "manifest.jsonl").write_bytes(
            b"".join(part + b"\n" for part in whole[1:])[: rng.choice((None, -1, -9))]
        )
        read_run(folder)
        with Manifest(folder, Shard(0, 1)):
            finished(folder, numbering)
            finished(folder, numbering, verify=True)
        a, b = Run.read(folder), Run.read(folder)
        list(compare_pairs(a, b, match(a, b)[0]))

    return feed


def calibrations_work(place: Place) -> Feed:
    """The folder of a calibration's unfinished work; whatever is wrong, it is cut off or made again."""
    solver = {"full_steps": [0, 5], "rows": [[0.9, 0.1, 0.2], [0.8, 0.1, 0.1, 0.2, 0.3]]}
    trials = [{"candidate": ["x0", n], "psnr": [40.0, 41.0], **solver} for n in range(3)]
    settings = {"model": "abc", "num_steps": 50}

    def feed(rng: Random) -> None:
        folder = WorkFolder(place.folder / "work")
        folder.clear()
        (folder.path / "settings.json").write_bytes(mutate_bytes(json.dumps(settings).encode(), rng))
        path = folder.path / "trials.jsonl"
        whole = [dumped(one) for one in trials[:-1]] + [dumped(mutate_json(trials[-1], rng))]
        data = b"\n".join(whole) + b"\n"
        path.write_bytes(mutate_bytes(data, rng) if rng.random() < 0.5 else data)
        folder.claim(settings)
        if path.is_file():
            read_lines(path, rng.choice((psnr_of, solver_of_line)))

    return feed


def prompt_file(place: Place) -> Feed:
    """A file of prompts in each format."""
    row = {"prompt": "a red circle", "negative_prompt": "b", "seed": 3, "width": 64, "height": 64, "num_steps": 4}
    table = "prompt,negative_prompt,seed,width\n" + '"a, ""red"" circle",b,3,64\nx,,4,64\n'
    texts = {".txt": "a red circle\n\na star\n", ".csv": table, ".tsv": table.replace(",", "\t")}

    def feed(rng: Random) -> None:
        suffix = rng.choice((".txt", ".csv", ".tsv", ".jsonl"))
        path = place.folder / f"a{suffix}"
        if suffix == ".jsonl":
            data = dumped(mutate_json(row, rng)) + b"\n"
            path.write_bytes(mutate_bytes(data, rng) if rng.random() < 0.3 else data)
        else:
            path.write_bytes(mutate_bytes(texts[suffix].encode(rng.choice(("utf-8", "utf-8-sig", "utf-16"))), rng))
        prompts = PromptFile(path)
        prompts.unread_columns()
        for line in prompts:
            SamplingOptions(**({"prompt": line.prompt} | dict(line.overrides)))

    return feed


def scores_file(place: Place) -> Feed:
    """Scores that were measured elsewhere."""
    text, path = "run,index,image,clip\na,0,0,0.31\nb,0,0,0.32\n", place.folder / "scores.csv"

    def feed(rng: Random) -> None:
        path.write_bytes(mutate_bytes(text.encode(), rng))
        read_scores(path)

    return feed


def api_fields(place: Place) -> Feed:
    """The fields of the page and its API."""
    models: dict[str, OfferedModel] = dict(offer_models("nano", ModelSource(), None))
    values = {"prompt": "a", "negative_prompt": "", "model": "nano", "seed": 7, "width": 64, "height": 64}
    values |= {"num_steps": 50, "guidance": 2.0, "scheduler": "unipc", "shift": 3.0, "max_sequence_length": 32}
    values |= {"cache": "taylorseer", "target": "x0", "basis": "taylor", "schedule": "interval", "fresh_threshold": 4}
    values |= {"full_steps": None, "max_order": 1, "num_images": 1}

    def feed(rng: Random) -> None:
        check(mutate_json(values, rng), Limits(), models)

    return feed


def model_configs(place: Place) -> Iterator[tuple[Path, bytes]]:
    """The JSON files of a model's folder: path within it, content."""
    for path in sorted(place.tiny.rglob("*.json")):
        if path.stat().st_size < 100_000:
            yield path.relative_to(place.tiny), path.read_bytes()


def model_folder(place: Place) -> Feed:
    """A model's folder, of which one JSON file is changed; drawn from with the script."""
    import contextlib
    import io

    from hi_diffusers.commands import inference

    configs = list(model_configs(place))
    folder = place.folder / "model"
    shutil.copytree(place.tiny, folder)
    flags = ["--num_steps", "1", "--cache", "off", "--seed", "1", "--device", "cpu", "-o", str(place.folder / "a.png")]

    def feed(rng: Random) -> None:
        name, data = rng.choice(configs)
        try:
            content = json.loads(data)
            changed = mutate_bytes(data, rng) if rng.random() < 0.2 else dumped(mutate_json(content, rng))
            (folder / name).write_bytes(changed)
            told = io.StringIO()
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
                code = inference.main(["a red circle", "--model_path", str(folder), *flags])
        finally:
            (folder / name).write_bytes(data)
        if code == 2:
            raise ValueError(told.getvalue().splitlines()[-1])
        if code != 0:
            raise AssertionError(f"{name}: {told.getvalue()[-400:]}\n{changed[:300]!r}")

    return feed


READERS: dict[str, Callable[[Place], Feed]] = {
    "safetensors header": safetensors_header,
    "gguf header": gguf_header,
    "lora": lora,
    "calibration": calibration,
    "embeddings": embeddings,
    "metadata": metadata,
    "input picture": input_picture,
    "run folder": run_folder,
    "calibration's work": calibrations_work,
    "prompt file": prompt_file,
    "scores": scores_file,
    "api fields": api_fields,
    "model folder": model_folder,
}
REPAIRING = ("embeddings", "calibration's work")  # what is wrong there is made again
SLOW = ("model folder", "gguf header", "safetensors header")  # tenths of a second each

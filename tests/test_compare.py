"""compare.py: two runs, picture by picture."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hi_diffusers.commands import compare
from hi_diffusers.pictures.metrics import psnr, ssim
from hi_diffusers.runs.comparison import Run, Summary, match
from hi_diffusers.runs.manifest import sha256_of
from hi_diffusers.runs.scores import clip_score, read_scores
from tests.test_inference import Run as Result

SIZE = 32


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def write_run(folder: Path, pictures: dict[int, Image.Image | None], seconds: float = 2.0, **more: object) -> Path:
    """A run of one picture a prompt; None is withheld."""
    folder.mkdir()
    (folder / "run.json").write_text('{"fixed": {"model_type": "nano"}, "first": {}}', encoding="utf-8")
    lines = []
    for index, image in pictures.items():
        file = f"{index:05d}_00.png" if image else ""
        if image:
            image.save(folder / file)
        data = (folder / file).read_bytes() if image else b""
        line = {
            "index": index,
            "image": 0,
            "prompt": f"prompt <{index}>",
            "seed": index,
            "seconds": seconds,
            "file": file,
        }
        lines.append(json.dumps({**line, "bytes": len(data), "sha256": sha256_of(data), "time": 1.0, **more}))
    (folder / "manifest.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the script in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> Result:
        capsys.readouterr()
        return Result(compare.main([str(part) for part in argv]), *capsys.readouterr())

    return run


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Runs of three prompts, of which the first pair is identical."""
    a = write_run(tmp_path / "a", {0: picture(0), 1: picture(1), 2: picture(2)})
    b = write_run(
        tmp_path / "b", {0: picture(0), 1: picture(11), 2: Image.blend(picture(2), picture(12), 0.1)}, seconds=0.5
    )
    return a, b


def test_pairs_are_measured_in_float_on_the_saved_pictures(run: Callable[..., Result], two: tuple[Path, Path]) -> None:
    assert run(*two, "--json", "all.json").code == 0
    pairs = json.loads(Path("all.json").read_text())["pairs"]
    assert pairs[0]["psnr"] is None and pairs[0]["ssim"] == 1
    assert pairs[1]["psnr"] == pytest.approx(psnr(picture(1), picture(11)), abs=1e-3)
    assert pairs[1]["psnr"] < 10, "wrapped around, two noises would be near 28 dB"
    assert pairs[1]["ssim"] == pytest.approx(ssim(picture(1), picture(11)), abs=1e-5)


def test_the_table_has_median_mean_tenth_and_the_speed(run: Callable[..., Result], two: tuple[Path, Path]) -> None:
    out = run(*two).out
    assert re.search(r"^PSNR in dB +\d+\.\d\d \(\d+\.\d\d \.\. \d+\.\d\d\)", out, re.M)
    assert "1 of 3 pairs are identical;" in out
    assert "A 2.000, B 0.500, so B has 4.00x the speed" in out
    assert "Not measured: LPIPS (pip install lpips), CLIP score (--clip), ImageReward" in out


def test_pictures_that_cannot_be_compared_are_listed(tmp_path: Path, run: Callable[..., Result]) -> None:
    a = write_run(tmp_path / "a", {0: picture(0), 1: picture(1), 2: picture(2), 3: None})
    b = write_run(tmp_path / "b", {0: picture(0), 2: picture(2), 3: picture(3), 4: picture(4)})
    (b / "00002_00.png").unlink()
    err = run(a, b).err
    for index, reason in (
        (1, f"only in {a}"),
        (2, f"its file is missing in {b}"),
        (3, f"withheld in {a}"),
        (4, f"only in {b}"),
    ):
        assert f"not compared: prompt {index}, image 0, {reason}" in err


def test_a_broken_picture_and_one_of_another_size_do_not_stop_the_others(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    a = write_run(tmp_path / "a", {index: picture(index) for index in range(3)})
    b = write_run(tmp_path / "b", {index: picture(index) for index in range(3)})
    (b / "00000_00.png").write_bytes((b / "00000_00.png").read_bytes()[:200])
    picture(1).resize((16, 16)).save(b / "00001_00.png")
    result = run(a, b)
    assert result.code == 0
    assert "not compared: prompt 0, image 0" in result.err and "cannot be read" in result.err
    assert "not compared: prompt 1, image 0, pictures of different shapes" in result.err
    assert "1 of 1 pairs are identical" in result.out


def test_a_manifest_cannot_name_a_file_outside_the_run(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"")
    folder = write_run(tmp_path / "a", {0: picture(0)}, file="../secret.png")
    with pytest.raises(ValueError, match="file must be the name of a picture"):
        Run.read(folder)


@pytest.mark.parametrize("flags", [("--worst", 0), ("--report", "."), ("--report", "no/x.html"), ("--clip", "./none")])
def test_what_cannot_be_done_is_refused_before_pictures_are_read(
    run: Callable[..., Result], two: tuple[Path, Path], flags: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "compare_pairs", None)
    result = run(*two, *flags)
    assert result.code == 2
    assert str(flags[0]) in result.lines[-1]


def test_another_seed_or_prompt_is_no_pair(tmp_path: Path) -> None:
    a = Run.read(write_run(tmp_path / "a", {0: picture(0)}))
    for name, value in (("seed", 5), ("prompt", "other")):
        keys, unpaired = match(a, Run.read(write_run(tmp_path / name, {0: picture(0)}, **{name: value})))
        assert keys == []
        assert unpaired[0].reason.startswith(f"another {name}: ")


def test_runs_with_nothing_in_common_and_other_folders_are_refused(tmp_path: Path, run: Callable[..., Result]) -> None:
    a, b = write_run(tmp_path / "a", {0: picture(0)}), write_run(tmp_path / "b", {1: picture(0)})
    assert run(a, b).code == 2
    result = run(a, tmp_path)
    assert (result.code, result.lines) == (
        2,
        [
            f"compare.py: error: {tmp_path} holds no run: there is no {tmp_path}/run.json"
            " (see docs/options.md#comparepy)"
        ],
    )


def test_the_page_shows_the_worst_pairs_and_is_alone(run: Callable[..., Result], two: tuple[Path, Path]) -> None:
    assert run(*two, "--report", "r.html", "--worst", 1).code == 0
    page = Path("r.html").read_text()
    assert page.count("<figure>") == 1
    assert "prompt &lt;1&gt;" in page and "<1>" not in page
    assert page.count("src='data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=.?http", page)


def test_scores_measured_elsewhere_are_merged(run: Callable[..., Result], two: tuple[Path, Path]) -> None:
    rows = [
        "run,index,image,ImageReward",
        *(f"{name},{i},0,{value + i}" for name, value in (("a", 1.0), ("b", 1.5)) for i in range(3)),
    ]
    Path("s.csv").write_text("\n".join(rows), encoding="utf-8")
    assert re.search(
        r"^ImageReward, B - A +0\.50 \(0\.50 \.\. 0\.50\) +0\.50", run(*two, "--scores", "s.csv").out, re.M
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run,index,image\na,0,0\n", "must have the columns run, index, image and one column per score"),
        ("run,index,image,x\nc,0,0,1\n", "line 2: run must be a or b, got 'c'"),
        ("run,index,image,x\na,0,0,much\n", "line 2: could not convert string to float: 'much'"),
        ("run,index,image,x\na,0,0\n", "line 2: must have 4 cells, as the first line has"),
        ("run,index,image,x\na,0,0,nan\n", "line 2: x must be a finite number, got nan"),
        ("run,index,image,x\na,0,0,1\na,0,0,2\n", "line 3: scores prompt 0, image 0 of run a a second time"),
        ("run,index,image,x\n", "holds no score"),
    ],
)
def test_scores_that_cannot_be_read_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_scores(path)


def test_a_summary_is_of_the_values() -> None:
    found = Summary.of([*range(10), 100])
    assert (found.count, found.median, found.p10) == (11, 5.0, 1.0)
    assert found.mean == pytest.approx(145 / 11)
    assert found.median_interval[0] < found.median < found.median_interval[1]


def test_the_clip_score_is_a_cosine(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from training.tokenizers import build_tokenizers

    tokenizer = build_tokenizers(["a", "cat"])["tokenizer"]
    size = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "projection_dim": 8,
    }
    text = size | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=size | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer).save_pretrained(tmp_path)
    score = clip_score(str(tmp_path))
    values = {score(picture(seed), "a cat") for seed in range(3)}
    assert len(values) == 3
    assert all(-100 <= value <= 100 for value in values)

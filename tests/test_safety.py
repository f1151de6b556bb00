"""The safety checker withholds what its classifier flags, and is never left out in silence."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from hi_diffusers.pictures.safety import SafetyChecker, SafetySettings


def write_classifier(folder: Path, labels: dict[int, str]) -> Path:
    """A tiny image classifier that calls bright pictures by the second label."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=32,
        patch_size=16,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.vit.embeddings.patch_embeddings.projection.weight[0] = 1.0
        model.vit.layernorm.weight.fill_(1.0)
        model.vit.embeddings.cls_token.zero_()
        model.classifier.bias[1] = 1.0
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_picture_is_withheld_from_the_threshold_on(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "checker", {0: "normal", 1: "nsfw"})
    checker = SafetyChecker(SafetySettings(str(folder), threshold=0.7))
    score = checker.score(Image.new("RGB", (64, 64), "white"))
    assert score == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=1e-4)
    assert checker.withholds(score)
    assert not checker.withholds(0.69)


def test_a_rare_label_among_many_is_found(tmp_path: Path) -> None:
    """A classifier's pipeline shows the first five labels unless told otherwise."""
    names = ["a", "b", "c", "d", "e", "f", "NSFW"]
    checker = SafetyChecker(SafetySettings(str(write_classifier(tmp_path / "checker", dict(enumerate(names))))))
    assert 0 < checker.score(Image.new("RGB", (64, 64))) < 1 / 7


def test_a_classifier_without_the_label_is_refused(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "checker", {0: "cat", 1: "dog"})
    with pytest.raises(ValueError, match=r"must have the label nsfw, got .* with cat, dog"):
        SafetyChecker(SafetySettings(str(folder)))


def test_a_classifier_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"safety_checker .* cannot be loaded"):
        SafetyChecker(SafetySettings(str(tmp_path)))


@pytest.mark.parametrize("threshold", [0.0, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="safety_threshold must be above 0 and up to 1"):
        SafetySettings(threshold=threshold)

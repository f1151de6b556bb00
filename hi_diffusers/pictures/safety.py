"""Withholding pictures that an image classifier flags."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

DEFAULT_CHECKER = "Falconsai/nsfw_image_detection"
LABEL = "nsfw"


@dataclass(frozen=True)
class SafetySettings:
    """Which pictures are withheld.

    Attributes:
        model: an image classifier of transformers, by hub id or folder, one of whose labels is "nsfw".
        threshold: probability of that label from which a picture is withheld, above 0 to 1.
    """

    model: str = DEFAULT_CHECKER
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"safety_threshold must be above 0 and up to 1, got {self.threshold}")


class SafetyChecker:
    """An image classifier, ready to judge.

    Args:
        settings: the classifier and its threshold.
        device: a torch device or its name.

    Raises:
        ValueError: if it cannot be loaded, or has no label "nsfw".
    """

    def __init__(self, settings: SafetySettings, device: Any = "cpu"):
        from transformers import pipeline

        try:
            self.classify = pipeline(
                "image-classification", model=settings.model, device=device, model_kwargs={"use_safetensors": True}
            )
        except Exception as error:  # after any error, no picture may be drawn unchecked
            raise ValueError(f"safety_checker {settings.model} cannot be loaded: {error}") from error
        labels = self.classify.model.config.id2label.values()
        if LABEL not in {label.lower() for label in labels}:
            raise ValueError(
                f"safety_checker must have the label {LABEL}, got {settings.model} with {', '.join(labels)}"
            )
        self.threshold, self.num_labels = settings.threshold, len(labels)

    def score(self, image: Image.Image) -> float:
        """Probability of the label "nsfw"."""
        found = self.classify(image, top_k=self.num_labels)
        return max(float(one["score"]) for one in found if one["label"].lower() == LABEL)

    def judges(self, image: Image.Image) -> bool:
        """Whether this picture is withheld."""
        return self.withholds(self.score(image))

    def withholds(self, score: float) -> bool:
        """Whether a picture of that score is withheld."""
        return score >= self.threshold

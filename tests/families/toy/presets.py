"""The one model of the family."""

from pathlib import Path

from hi_diffusers.preset import ModelPreset

FOLDER = Path(__file__).parent
PRESETS = (
    ModelPreset(
        name="toy",
        family="toy",
        folder=FOLDER,
        num_steps=8,
        guidance=0.0,
        shift=3.0,
        scheduler="euler",
        max_sequence_length=16,
        area=32 * 32,
        multiple=8,
        examples=("grey",),
        calibration_prompts=FOLDER / "prompts.txt",
    ),
)

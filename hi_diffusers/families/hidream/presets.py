"""The models of this family: HiDream-I1 as published, and the bundled small ones."""

from dataclasses import dataclass, replace

from hi_diffusers.preset import ModelPreset, assets_folder

NANO_FOLDER = "hidream-nano"
# nano's vocabulary: the words and marks of training/scenes.py that 64 pixels can show.
NANO_WORLD = (
    ", . : a above an and background below black blue checked circle cross cyan dotted fish gradient green house"
    " is large left object objects of on one orange over picture pink plain purple red right ring small square"
    " star striped sun the there three to tree triangle two under white with yellow"
)
NANO_SECONDS = "0.23 with 13 of 50 steps full, 0.69 uncached, on two cores of an Intel Xeon (docs/performance.md)"
NANO_EXAMPLES = (
    "a large yellow circle on a blue background",
    "a small red star on a white background",
    "a green tree on a pink background",
    "a large blue square to the left of a small orange circle on a black background",
)
HIDREAM_EXAMPLES = (
    'A cat holding a sign that says "HiDream.ai".',
    "A lighthouse on a cliff at dusk, long exposure, film grain.",
    "An isometric drawing of a tiny bakery, warm light in the windows.",
    "A watercolour of a heron in morning fog.",
)


@dataclass(frozen=True, kw_only=True)
class HiDreamPreset(ModelPreset):
    """A preset of this family.

    Attributes:
        llama_repo: hub repository of the Llama; None if the pipeline's folder holds it.
        gptq_llama_repo: repository of the Llama in GPTQ-INT4; no account needed.
    """

    llama_repo: str | None = None
    gptq_llama_repo: str | None = None


def _hidream(name: str, variant: str, num_steps: int, guidance: float, shift: float, scheduler: str) -> HiDreamPreset:
    return HiDreamPreset(
        name=name,
        family="hidream",
        repo=f"HiDream-ai/HiDream-I1-{variant}",
        nf4_repo=f"azaneko/HiDream-I1-{variant}-nf4",
        llama_repo="meta-llama/Llama-3.1-8B-Instruct",
        gptq_llama_repo="hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4",
        num_steps=num_steps,
        guidance=guidance,
        shift=shift,
        scheduler=scheduler,
        max_sequence_length=128,
        area=1024 * 1024,
        multiple=16,
        examples=HIDREAM_EXAMPLES,
        calibration_prompts=assets_folder() / "calibration_prompts.txt",
    )


def _nano(name: str, num_steps: int, guidance: float, shift: float, scheduler: str) -> HiDreamPreset:
    folder = assets_folder() / NANO_FOLDER
    return HiDreamPreset(
        name=name,
        family="hidream",
        folder=folder,
        num_steps=num_steps,
        guidance=guidance,
        shift=shift,
        scheduler=scheduler,
        max_sequence_length=32,
        area=64 * 64,
        multiple=8,
        examples=NANO_EXAMPLES,
        calibration_prompts=folder / "calibration" / "prompts.txt",
        vocabulary=frozenset(NANO_WORLD.split()),
        world="circles, squares, triangles, stars, crosses, rings, houses, trees, suns and fish in ten colours",
    )


PRESETS = (
    replace(_nano("nano", 50, 2.0, 3.0, "unipc"), measured=NANO_SECONDS),
    _nano("nano-dev", 28, 0.0, 6.0, "lcm"),
    _nano("nano-fast", 16, 0.0, 3.0, "lcm"),
    _hidream("full", "Full", 50, 5.0, 3.0, "unipc"),
    _hidream("dev", "Dev", 28, 0.0, 6.0, "lcm"),
    _hidream("fast", "Fast", 16, 0.0, 3.0, "lcm"),
)

"""Prompt embeddings on disk are the encoders' own, and are made once."""

import os
from pathlib import Path

import pytest
import torch

from hi_diffusers import load_pipeline
from hi_diffusers.engine.embeds import EmbedsCache, embeds_folder
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.prompts import PromptEmbeds
from hi_diffusers.families.table import PRESETS, find_family
from hi_diffusers.memory.sizes import embedded_numbers
from hi_diffusers.weights.source import ModelSource
from tests.tiny_folder import OTHER_PROMPT, PROMPT, Calls

CPU = torch.device("cpu")


def encoder(pipe: HiDreamImagePipeline, length: int = 32) -> Calls:
    return Calls(lambda prompt: pipe.encode([prompt], length))


def equal(a: PromptEmbeds, b: PromptEmbeds) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("t5", "llama", "pooled"))


def test_a_prompt_is_encoded_once_and_comes_back_bit_by_bit(tmp_path: Path, tiny_pipe: HiDreamImagePipeline) -> None:
    encode = encoder(tiny_pipe)
    EmbedsCache(tmp_path, PromptEmbeds, 32).fill([PROMPT, OTHER_PROMPT, PROMPT], encode)
    assert encode.count == 2
    again = EmbedsCache(tmp_path, PromptEmbeds, 32)
    again.fill([PROMPT], encode)
    found = again.get([PROMPT, OTHER_PROMPT], encode, CPU)
    assert encode.count == 2
    first, second = (tiny_pipe.encode([prompt], 32) for prompt in (PROMPT, OTHER_PROMPT))
    assert equal(found, second.after(first))


def test_another_length_is_another_entry(tmp_path: Path, tiny_pipe: HiDreamImagePipeline) -> None:
    EmbedsCache(tmp_path, PromptEmbeds, 32).fill([PROMPT], encoder(tiny_pipe))
    assert PROMPT in EmbedsCache(tmp_path, PromptEmbeds, 32)
    assert PROMPT not in EmbedsCache(tmp_path, PromptEmbeds, 16)


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0nonsense", None])
def test_a_damaged_entry_is_made_again(tmp_path: Path, tiny_pipe: HiDreamImagePipeline, damage: bytes | None) -> None:
    encode, cache = encoder(tiny_pipe), EmbedsCache(tmp_path, PromptEmbeds, 32)
    cache.fill([PROMPT], encode)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    assert equal(cache.get([PROMPT], encode, CPU), tiny_pipe.encode([PROMPT], 32))
    cache.fill([PROMPT], encode)
    assert encode.count == 3
    assert cache.get([PROMPT], encode, CPU)
    assert encode.count == 3


def test_another_prompts_or_a_broken_entry_is_not_believed(tmp_path: Path, tiny_pipe: HiDreamImagePipeline) -> None:
    encode, cache = encoder(tiny_pipe), EmbedsCache(tmp_path, PromptEmbeds, 32)
    cache.fill([PROMPT], encode)
    cache._path(PROMPT).rename(cache._path(OTHER_PROMPT))
    right = tiny_pipe.encode([OTHER_PROMPT], 32)
    assert equal(cache.get([OTHER_PROMPT], encode, CPU), right)
    cache.fill([OTHER_PROMPT], lambda _: PromptEmbeds(right.t5 / 0, right.llama, right.pooled))
    assert equal(cache.get([OTHER_PROMPT], encode, CPU), right)
    assert encode.count == 3


def test_the_oldest_entries_go_first_and_those_in_use_stay(tmp_path: Path, tiny_pipe: HiDreamImagePipeline) -> None:
    encode, cache = encoder(tiny_pipe), EmbedsCache(tmp_path, PromptEmbeds, 32)
    for seconds, prompt in ((1, "old"), (2, "middle"), (3, "new")):
        cache.fill([prompt], encode)
        path = cache._path(prompt)
        os.utime(path, (seconds, seconds))
    size = path.stat().st_size
    limited = EmbedsCache(tmp_path, PromptEmbeds, 32, limit_bytes=2.5 * size)
    limited.fill(["new"], encode)
    assert [prompt in cache for prompt in ("new", "middle", "old")] == [True, True, False]
    limited.fill(["middle"], encode)
    limited.fill(["old"], encode)
    assert [prompt in cache for prompt in ("new", "middle", "old")] == [False, True, True], "use makes an entry young"
    EmbedsCache(tmp_path, PromptEmbeds, 32, limit_bytes=0).fill(["new", "old"], encode)
    assert [prompt in cache for prompt in ("new", "middle", "old")] == [True, False, True], "a run needs its own chunk"


def test_encoders_dtype_and_place_each_have_a_folder(tmp_path: Path) -> None:
    made_by = (("a", "fp32", "cpu1"), ("b", "fp32", "cpu1"), ("a", "bf16", "cpu1"), ("a", "fp32", "cpu2"))
    assert len({embeds_folder(tmp_path, *one) for one in made_by}) == 4


def test_the_size_of_an_entry_is_told_before_encoding(tmp_path: Path, nano_folder: Path) -> None:
    pipe = load_pipeline("nano", device="cpu", parts="encoders")
    EmbedsCache(tmp_path, PromptEmbeds, 32).fill([PROMPT], encoder(pipe))
    (path,) = tmp_path.iterdir()
    header, nano = 1000, PRESETS["nano"]
    numbers = embedded_numbers(find_family(nano).shapes(nano, ModelSource()), 32)
    assert 0 <= path.stat().st_size - 4 * numbers < header

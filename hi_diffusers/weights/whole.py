"""Checks that the files of a model's components are complete, before weights are read.

Libraries accept incomplete files: they build a tokenizer of two tokens if its vocabulary is lost, and fill missing
weights with random numbers. Either would give a wrong picture without any error.
"""

import re
from pathlib import Path
from typing import Any

from hi_diffusers.weights.headers import safetensors_header
from hi_diffusers.weights.source import read_json, refuse_pointer

SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
# A component's folder must hold one of these; a component that is not named here is a model with a config.json.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")
DESCRIPTIONS = {"scheduler": ("scheduler_config.json",), "tokenizer": TOKENIZER_FILES}
SENTENCEPIECE = ("spiece.model", "tokenizer.model")
MAX_COUNT = 1_000_000
MAX_LAYERS = 1_000


def check_component(part: Path, weights: bool) -> None:
    """Raise ValueError if a component lacks its configuration, its vocabulary or its weights.

    Args:
        part: folder of the component, in the diffusers layout.
        weights: whether its weights must be there, too.

    Raises:
        ValueError: naming the missing or broken file.
    """
    if not part.is_dir():
        raise ValueError(f"{part} is missing: the model's folder is incomplete")
    kind = part.name.split("_")[0]
    descriptions = DESCRIPTIONS.get(kind, ("config.json",))
    if not any((part / file).is_file() for file in descriptions):
        raise ValueError(f"{part} holds no {' or '.join(descriptions)}: the model's folder is incomplete")
    if kind == "tokenizer":
        check_tokenizer(part)
    elif kind == "scheduler":
        read_json(part / descriptions[0])
    else:
        check_config(part)
        if weights:
            check_weights(part)


def check_tokenizer(part: Path, num_embedded: int | None = None) -> None:
    """Raise ValueError if a tokenizer's vocabulary is missing, incomplete or another model's.

    Args:
        part: folder of its files.
        num_embedded: number of tokens that the text encoder embeds; None is unknown.

    Raises:
        ValueError: naming the file.
    """
    if (part / "tokenizer_config.json").is_file():
        read_json(part / "tokenizer_config.json")
    tokenizer, vocabulary, merges = (part / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if tokenizer.is_file():
        model = read_json(tokenizer).get("model")
        words = model.get("vocab") if isinstance(model, dict) else None
        num_words = len(words) if isinstance(words, dict | list) else 0
    elif vocabulary.is_file() and merges.is_file():
        refuse_pointer(merges)
        num_words = len(read_json(vocabulary))
    elif any((part / name).is_file() for name in SENTENCEPIECE):
        for name in SENTENCEPIECE:
            if (part / name).is_file():
                refuse_pointer(part / name)
        return
    else:
        raise ValueError(
            f"{part} lacks its vocabulary: it must hold tokenizer.json, or vocab.json and merges.txt, or a"
            " SentencePiece model"
        )
    if num_words == 0:
        raise ValueError(f"{part} holds an empty vocabulary: the file is incomplete, or not a tokenizer's")
    if num_embedded is not None and not num_embedded / 2 <= num_words <= num_embedded:
        raise ValueError(
            f"{part} has a vocabulary of {num_words} tokens, but its text encoder embeds {num_embedded}: one of them"
            " is another model's, or incomplete"
        )


def check_config(part: Path) -> dict[str, Any]:
    """Read and check a component's configuration.

    Raises:
        ValueError: if it names code to download, or implausible sizes.
    """
    path = part / "config.json"
    config = read_json(path)
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        kernel = config.get(name)
        if kernel is not None and (not isinstance(kernel, str) or "/" in kernel):
            raise ValueError(f"{path} sets {name} to code from a hub, {str(kernel)[:60]!r}: remove that entry")
    for name, value in config.items():
        if "theta" in name:  # of rotary embeddings: a period, no size
            continue
        sizes = value if isinstance(value, list) else [value]
        most = MAX_LAYERS if "layers" in name and not isinstance(value, list) else MAX_COUNT
        if len(sizes) > MAX_LAYERS or any(isinstance(one, int) and abs(one) > most for one in sizes):
            raise ValueError(f"{path} has {name} {str(value)[:60]}, which is too large for such a model")
    return config


def check_weights(part: Path) -> None:
    """Raise ValueError if a folder's safetensors files are missing or incomplete."""
    files = sorted(part.glob("*.safetensors"))
    indices = sorted(part.glob("*.safetensors.index.json"))
    for index in indices:
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{index} holds no weight_map from weights to files")
        for shard in sorted(set(shards.values())):
            if not (part / shard).is_file():
                raise ValueError(f"{part / shard} is missing, although {index.name} names it: the folder is incomplete")
    if not files:
        raise ValueError(
            f"{part} holds no .safetensors file: the model's folder is incomplete, or its weights are pickled"
        )
    shard = next((path for path in files if SHARD.fullmatch(path.name)), None)
    if shard is not None and not indices:
        raise ValueError(f"{shard} is one of several files, and their .safetensors.index.json is missing")
    for path in files:
        safetensors_header(path)

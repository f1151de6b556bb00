import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.training.tiny_runs import assert_same_state, read_checkpoint
from training import scenes
from training.captions import (
    NOT_THERE,
    NOUN_ATTRIBUTES,
    PHRASE_ATTRIBUTES,
    SCENE_ATTRIBUTES,
    LabelledCaption,
    draw_captions,
)
from training.checkpoint import load_checkpoint, save_checkpoint
from training.encoders import FILES, build_encoders, load_encoders
from training.process import require_files
from training.text import TextRecipe, Trainer, main, train
from training.tokenizers import BOS, EOS, FOLDERS, PAD, UNK, build_tokenizers, split_words, unknown_words

CAPTION = "A small RED circle, left of a blue star on a green background."


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return build_tokenizers(scenes.vocabulary())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    trainer = Trainer(TextRecipe(steps=4, batch_size=4))
    train(trainer, folder, save_every=2, log_every=1)
    return folder


def label(tokenizers: dict[str, PreTrainedTokenizerBase], text: str) -> LabelledCaption:
    return LabelledCaption.of(split_words(tokenizers["tokenizer"], text), scenes.parse_caption(text))


def values(labels: list[int], attributes: dict[str, tuple[object, ...]]) -> dict[str, object]:
    pairs = zip(attributes.items(), labels, strict=True)
    return {name: classes[index] for (name, classes), index in pairs if index != NOT_THERE}


def test_a_caption_survives_the_way_to_ids_and_back_in_lower_case(tokenizers) -> None:
    words = "a small red circle , left of a blue star on a green background ."
    for tokenizer in tokenizers.values():
        ids = tokenizer(CAPTION).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == words


def test_every_caption_of_the_grammar_is_free_of_unknown_words_and_fits_32_tokens(tokenizers) -> None:
    rng = np.random.default_rng(0)
    for tier in scenes.TIERS.values():
        for _ in range(200):
            text = scenes.caption(scenes.sample_scene(rng, tier), rng)
            assert unknown_words(tokenizers["tokenizer"], text) == []
            assert len(tokenizers["tokenizer"](text).input_ids) <= 32, text


def test_unknown_words_are_named_once_in_order_and_punctuation_hides_none(tokenizers) -> None:
    tokenizer = tokenizers["tokenizer"]
    assert unknown_words(tokenizer, "A Zeppelin, over_a red circle; the zeppelin (small)") == [
        "zeppelin",
        ";",
        "(",
        ")",
    ]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a zeppelin").input_ids) == [BOS, "a", UNK, EOS]


def test_each_encoder_gets_the_special_tokens_and_padding_it_expects(tokenizers) -> None:
    def padded(name: str) -> list[str]:
        ids = tokenizers[name](["a", "a star"], padding="longest").input_ids[0]
        return tokenizers[name].convert_ids_to_tokens(ids)

    assert padded("tokenizer") == padded("tokenizer_2") == [BOS, "a", EOS, EOS]
    assert padded("tokenizer_3") == ["a", EOS, PAD]
    assert padded("tokenizer_4") == [BOS, "a", EOS]


@pytest.mark.parametrize("vocabulary", [["a", "a"], ["<eos>"], ["Red"], ["left-of"]])
def test_a_vocabulary_that_could_not_be_found_again_is_refused(vocabulary: list[str]) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        build_tokenizers(vocabulary)


def test_labels_say_what_the_caption_says_and_leave_open_what_it_leaves_open(tokenizers) -> None:
    caption = label(tokenizers, "a small red circle above a blue star on a striped green background")
    stated = values(caption.scene, SCENE_ATTRIBUTES)
    assert stated["num_objects"] == 2 and stated["relation_0"] == "above"
    assert (stated["shape_0"], stated["colour_0"], stated["size_0"]) == ("circle", "red", "small")
    assert (stated["shape_1"], stated["colour_1"], stated["size_1"]) == ("star", "blue", None)
    assert (stated["background_colour"], stated["background_kind"]) == ("green", "striped")
    assert "shape_2" not in stated, "a third object that is not there must not be learned"


def test_each_word_of_a_noun_phrase_is_labelled_with_its_own_object(tokenizers) -> None:
    caption = label(tokenizers, "a small red circle above a blue star on a striped green background")
    told = {
        word: values(labels, PHRASE_ATTRIBUTES) for word, labels in zip(caption.words, caption.phrases, strict=True)
    }
    assert told["small"] == told["red"] == told["circle"]
    assert (told["circle"]["owner"], told["circle"]["colour"]) == (0, "red")
    assert (told["star"]["owner"], told["star"]["colour"], told["star"]["relation_0"]) == (1, "blue", "above")
    assert (told["striped"]["owner"], told["striped"]["colour"]) == ("background", "green")
    assert told["above"] == told["on"] == {}
    nouns = [word for word, noun in zip(caption.words, caption.nouns, strict=True) if noun]
    assert nouns == ["circle", "star", "background"]


def test_objects_are_numbered_as_they_are_told_even_if_the_relation_comes_first(tokenizers) -> None:
    """`parse_caption` returns the star first here; the circle would get the star's labels."""
    caption = label(tokenizers, "left of a red circle is a blue star on a green background")
    stated = values(caption.scene, SCENE_ATTRIBUTES)
    assert (stated["shape_0"], stated["shape_1"], stated["relation_0"]) == ("circle", "star", "right of")


def test_an_unknown_word_moves_the_labels_along_with_their_words(tokenizers) -> None:
    caption = label(tokenizers, "a red circle on a green background")
    caption.insert_unknown_word(1)
    assert caption.words[:4] == ["a", "unknown", "red", "circle"]
    assert values(caption.phrases[1], PHRASE_ATTRIBUTES) == {}
    assert values(caption.phrases[3], PHRASE_ATTRIBUTES)["shape"] == "circle"
    assert caption.nouns.index(True) == 3


def test_drawn_labels_stand_on_the_tokens_of_their_words(tokenizers) -> None:
    batch = draw_captions(tokenizers, np.random.default_rng(0), 32, scenes.GPU_TIER, empty=0.2, unknown=0.5)
    column = list(NOUN_ATTRIBUTES).index("shape")
    for row, word in zip(*torch.where(batch.phrases[..., column] != NOT_THERE), strict=True):
        if batch.nouns[row, word]:
            shape = NOUN_ATTRIBUTES["shape"][batch.phrases[row, word, column]]
            assert tokenizers["tokenizer_3"].decode(batch.t5[row, word]) == shape
            assert tokenizers["tokenizer_4"].decode(batch.llama[row, word + 1]) == shape


def test_what_real_tokens_get_does_not_depend_on_the_length_of_padding(tokenizers) -> None:
    """The pipeline pads to any length and has no text mask: attention to padding would change the picture."""
    torch.manual_seed(0)
    encoders = build_encoders(len(tokenizers["tokenizer"])).eval()

    def encode(length: int) -> list[torch.Tensor]:
        clip, t5, llama = (
            tokenizers[name](CAPTION, padding="max_length", max_length=length, return_tensors="pt")
            for name in ("tokenizer", "tokenizer_3", "tokenizer_4")
        )
        with torch.no_grad():
            hidden = encoders["text_encoder_4"](**llama, output_hidden_states=True).hidden_states
            pooled = [encoders[name](clip.input_ids).text_embeds for name in ("text_encoder", "text_encoder_2")]
            words = encoders["text_encoder_3"](**t5).last_hidden_state[:, :16]
        return [*pooled, words, *(states[:, :16] for states in hidden)]

    for short, long in zip(encode(32), encode(218), strict=True):
        torch.testing.assert_close(short, long, atol=2e-5, rtol=1e-4)


def test_a_saved_folder_loads_with_the_ordinary_classes(tokenizers, run_folder: Path) -> None:
    for name in FOLDERS:
        loaded = AutoTokenizer.from_pretrained(run_folder / name)
        assert loaded(CAPTION).input_ids == tokenizers[name](CAPTION).input_ids
        assert loaded.pad_token == tokenizers[name].pad_token
        assert loaded.model_max_length == tokenizers[name].model_max_length
    for name, encoder in load_encoders(run_folder).items():
        config = json.loads((run_folder / name / "config.json").read_text())
        assert config["architectures"] == [type(encoder).__name__]
        assert config["dtype"] == "bfloat16"
        assert all(parameter.isfinite().all() for parameter in encoder.parameters())


def test_the_four_encoders_stay_within_their_share_of_the_bundled_model(run_folder: Path) -> None:
    size = sum(file.stat().st_size for file in run_folder.glob("text_encoder*/model.safetensors"))
    assert size <= 1_600_000


def test_a_finished_run_holds_every_file_that_later_parts_ask_for(run_folder: Path) -> None:
    require_files("--text", run_folder, FILES)


def test_an_interrupted_run_ends_with_the_bits_and_the_log_of_an_uninterrupted_one(
    tmp_path: Path, run_folder: Path
) -> None:
    recipe = TextRecipe(steps=4, batch_size=4)
    interrupted = Trainer(recipe)
    for _ in range(2):
        interrupted.train_step()
    save_checkpoint(tmp_path / "checkpoint.pt", recipe, interrupted.state())
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    resumed = Trainer(recipe)
    torch.manual_seed(99)
    resumed.restore(load_checkpoint(tmp_path / "checkpoint.pt", recipe))
    train(resumed, tmp_path, log_every=1)
    assert_same_state(read_checkpoint(tmp_path / "checkpoint.pt"), read_checkpoint(run_folder / "checkpoint.pt"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 3, 4]


def test_bad_input_is_refused_in_one_line(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, reason in (
        (["--output", str(run_folder), "--batch_size", "4", "--steps", "5"], "steps is 4 there and 5 here"),
        (["--output", str(tmp_path / "new"), "--batch_size", "0"], "batch_size must be above 0, got 0"),
    ):
        assert main(flags) == 2
        err = capsys.readouterr().err
        assert reason in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("setting", [{"steps": 0}, {"learning_rate": -1.0}, {"unknown_words": 1.0}])
def test_a_recipe_refuses_values_that_make_no_sense(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        TextRecipe(**setting)

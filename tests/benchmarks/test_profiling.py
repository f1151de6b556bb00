"""Every operation is of one kind, and all kinds together are the whole."""

import json

import pytest

from benchmarks import profiling, variants


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::add_", "products, sums, activations"),
        ("aten::addcmul", "products, sums, activations"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::index_select", "gathers, copies, joins"),
        ("aten::native_layer_norm", "norms and softmax"),
        ("aten::view", "the rest"),
    ],
)
def test_an_operation_is_of_the_kind_its_name_begins_with(operation, kind):
    assert profiling.kind_of(operation) == kind


def test_three_ways_are_profiled_and_written(nano_folder, tmp_path, capsys):
    flags = ["--size", "nano", "--device", "cpu", "--repeats", "2", "--output", str(tmp_path)]
    assert profiling.main(flags) == 0
    (path,) = tmp_path.glob("profile_nano_*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["milliseconds"]
    assert list(found) == ["diffusers' class", "ours, plain", "ours"]
    assert all(kinds["matrix products"] > 0 and kinds["attention"] > 0 for kinds in found.values())


@pytest.mark.slow
def test_variants_take_turns_and_are_written(tmp_path, capsys):
    assert variants.main(["--size", "nano", "--device", "cpu", "--repeats", "1", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("variants_nano_*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["milliseconds"]
    assert set(found) == {
        "diffusers, fp32",
        "ours, fp32",
        "ours, fp32, compiled",
        "diffusers, bf16",
        "ours, bf16",
    }

"""The weighted sum of anchors: its value, its precision, its dtype, and what it does not read."""

import pytest
import torch

from taylor_utils import weighted_sum

WEIGHTS = [1 / 8, -3 / 4, 13 / 8]


def draw_anchors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 32, generator=generator).to(dtype) for _ in WEIGHTS]


def test_it_is_the_sum_of_weight_times_anchor() -> None:
    anchors = draw_anchors()
    exact = sum(weight * anchor.double() for weight, anchor in zip(WEIGHTS, anchors, strict=True))
    torch.testing.assert_close(weighted_sum(WEIGHTS, anchors).double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_anchors_are_summed_in_fp32(dtype: torch.dtype) -> None:
    anchors = draw_anchors(dtype)
    in_fp32 = sum(weight * anchor.float() for weight, anchor in zip(WEIGHTS, anchors, strict=True)).to(dtype)
    in_half = sum(weight * anchor for weight, anchor in zip(WEIGHTS, anchors, strict=True))
    assert not torch.equal(in_fp32, in_half), "the two precisions do not differ, so nothing is tested"
    assert torch.equal(weighted_sum(WEIGHTS, anchors), in_fp32)


def test_half_precision_anchors_give_the_fp32_sum_where_it_is_asked_for() -> None:
    anchors = draw_anchors(torch.bfloat16)
    total = weighted_sum(WEIGHTS, anchors, torch.float32)
    exact = sum(weight * anchor.double() for weight, anchor in zip(WEIGHTS, anchors, strict=True))
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), exact, rtol=0, atol=1e-6)


def test_the_result_has_the_newest_anchors_dtype() -> None:
    older, newest = torch.ones(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.float16)
    assert weighted_sum([-0.5, 1.5], [older, newest]).dtype == torch.float16


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_anchor_of_weight_0_is_not_read(place: int) -> None:
    anchors, weights = draw_anchors(), [0.5, 0.25, 0.25]
    expected = weighted_sum(weights[:place] + weights[place + 1 :], anchors[:place] + anchors[place + 1 :])
    anchors[place], weights[place] = torch.full((64, 32), float("nan")), 0.0
    assert torch.equal(weighted_sum(weights, anchors), expected)


def test_weights_that_are_all_0_give_zeros() -> None:
    total = weighted_sum([0.0, 0.0], [torch.full((2, 3), float("nan"), dtype=torch.bfloat16)] * 2)
    assert total.tolist() == [[0] * 3] * 2 and total.dtype == torch.bfloat16


def test_the_result_is_a_new_tensor_even_where_it_equals_an_anchor() -> None:
    anchor = torch.ones(4)
    weighted_sum([1.0], [anchor]).zero_()
    assert anchor.tolist() == [1, 1, 1, 1]


def test_the_anchors_are_not_changed() -> None:
    anchors = draw_anchors()
    before = [anchor.clone() for anchor in anchors]
    weighted_sum(WEIGHTS, anchors)
    assert all(torch.equal(anchor, copy) for anchor, copy in zip(anchors, before, strict=True))


@pytest.mark.parametrize(("weights", "num_anchors"), [([1.0], 2), ([1.0, 2.0, 3.0], 2), ([], 0)])
def test_anything_but_one_weight_per_anchor_is_refused(weights: list[float], num_anchors: int) -> None:
    with pytest.raises(ValueError, match=f"one per anchor.*got {len(weights)} for {num_anchors}"):
        weighted_sum(weights, [torch.ones(2)] * num_anchors)

"""What the cache holds: how many anchors, whose memory, and for how long."""

import pytest
import torch

from cache_functions import CacheConfig, CacheState, FeatureName

NAME = FeatureName("module", 0, "attention")
OTHER = FeatureName("module", 1, "attention")


def make_state(max_order: int = 1) -> CacheState:
    return CacheState(CacheConfig(target="module", fresh_threshold=4, max_order=max_order))


def storage_bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def test_a_whole_tensor_is_kept_without_a_copy() -> None:
    state, feature = make_state(), torch.randn(2, 16, 8)
    state.keep(NAME, feature)
    assert state.anchors[NAME][0].data_ptr() == feature.data_ptr()


def test_a_reshaped_whole_tensor_is_kept_without_a_copy() -> None:
    state, feature = make_state(), torch.randn(2, 16, 8)
    state.keep(NAME, feature.flatten(0, 1))
    assert state.anchors[NAME][0].data_ptr() == feature.data_ptr()


@pytest.mark.parametrize("view", [lambda x: x[:, :10], lambda x: x[1:], lambda x: x[..., :4], lambda x: x[:, ::2]])
def test_a_view_is_copied_so_that_it_pins_nothing_else(view) -> None:
    state, whole = make_state(), torch.randn(2, 16, 8)
    state.keep(NAME, view(whole))
    (kept,) = state.anchors[NAME]
    assert storage_bytes(kept) == kept.nbytes < storage_bytes(whole)
    assert torch.equal(kept, view(whole)) and kept.is_contiguous()
    whole.zero_()
    assert kept.abs().sum() > 0


@pytest.mark.parametrize("max_order", [0, 1, 2, 3])
def test_one_anchor_more_than_the_order_is_kept_newest_last(max_order: int) -> None:
    state = make_state(max_order)
    for step in range(0, 24, 4):
        state.full_steps.append(step)
        state.keep(NAME, torch.tensor(float(step)))
    kept = [anchor.item() for anchor in state.anchors[NAME]]
    assert kept == [0, 4, 8, 12, 16, 20][-(max_order + 1) :]
    assert state.anchor_steps == kept
    assert state.full_steps == [0, 4, 8, 12, 16, 20]


def test_what_is_kept_belongs_to_no_graph() -> None:
    state = make_state()
    state.keep(NAME, torch.randn(4, requires_grad=True) * 2)
    assert not state.anchors[NAME][0].requires_grad


def test_num_bytes_counts_every_kept_tensor() -> None:
    state = make_state()
    for _ in range(3):
        state.keep(NAME, torch.zeros(2, 5))
        state.keep(OTHER, torch.zeros(2, 5, dtype=torch.bfloat16))
    assert state.num_bytes() == 2 * (2 * 5 * 4 + 2 * 5 * 2)


def test_freeing_forgets_everything() -> None:
    state = make_state()
    state.full_steps.append(0)
    state.keep(NAME, torch.zeros(2, 5))
    state.free()
    assert state.num_bytes() == 0
    assert state.anchors == {} and state.full_steps == [] and state.anchor_steps == []

"""What all parity tests share."""

from collections.abc import Iterator

import pytest
import torch

from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from tests.tiny import Oracle, make_oracle, make_ours


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pair() -> tuple[Oracle, HiDreamImageTransformer2DModel]:
    """diffusers' class and ours, over equal weights."""
    oracle = make_oracle()
    return oracle, make_ours(oracle)

"""The graphs that compiled blocks take at HiDream-I1's published size."""

import itertools
from typing import Any
from unittest import mock

import torch

from hi_diffusers.families.hidream import moe
from hi_diffusers.families.hidream.published import TRANSFORMER
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.request.placement import compile_blocks

SIZES = ((1024, 1024), (1360, 768), (768, 1360), (1168, 880), (880, 1168))
BRANCHES = (2, 8, 1, 4)  # of one guided picture, of four, of one without guidance, of four


def count_graphs() -> list[dict[str, Any]]:
    """How many graphs compiled blocks take in one session of several sizes and batches, each whole, without a break.

    Two blocks of each kind, which have all roles there are; on the meta device, on which compilers trace.
    """
    graphs: list[Any] = []

    def trace(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    of_four_blocks = TRANSFORMER | {"num_layers": 2, "num_single_layers": 2, "llama_layers": [0, 1, 2, 3]}
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    with torch.device("meta"):
        model = HiDreamImageTransformer2DModel.from_config(of_four_blocks).to(torch.bfloat16).eval()
    torch._dynamo.reset()
    compile_blocks(model, fullgraph=True, backend=trace)
    rows = []
    try:
        with torch.no_grad(), mock.patch.object(moe, "STACKED_ON", ("meta",)):
            for count, (width, height) in itertools.product(BRANCHES, SIZES):
                before = len(graphs)
                texts = ((count, 128, 4096), (32, count, 128, 4096), (count, 2048))
                conditioning = model.prepare(*(torch.empty(*one, **like) for one in texts), (height // 16, width // 16))
                latents = torch.empty(count, 16, height // 8, width // 8, **like)
                model(latents, torch.empty(count, device="meta"), conditioning=conditioning)
                rows.append({"branches": count, "width": width, "height": height, "new_graphs": len(graphs) - before})
    finally:
        torch._dynamo.reset()
    return rows

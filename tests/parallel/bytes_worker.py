"""Counts what attention sends over two ranks: python -m tests.parallel.bytes_worker."""

import diffusers.models.attention_dispatch as attention
import torch
import torch.distributed as dist

from benchmarks.parallel import exchanged
from benchmarks.sizes import bare_pipeline, build_ours, find_size, make_inputs
from cache_functions import CacheConfig
from hi_diffusers.denoising.ranks import Split, join
from hi_diffusers.denoising.schedulers import make_scheduler

NUM_STEPS = 4


def main() -> None:
    """Draw with random weights; the bytes that diffusers' all-to-all sent must be those of the benchmark's formula."""
    size, device, sent = find_size("nano"), torch.device("cpu"), []
    ranks, _ = join(Split(2), "cpu")
    pipe = bare_pipeline(build_ours(size, device, torch.float32, 0))
    pipe.draw_with(ranks)
    exchange = attention.funcol.all_to_all_single

    def counted(values, *args):
        sent.append(values.numel() * values.element_size() // 2)  # the other half stays
        return exchange(values, *args)

    attention.funcol.all_to_all_single = counted
    scheduler, inputs = (
        make_scheduler(size.preset.scheduler, size.preset.shift),
        make_inputs(size, device, torch.float32, 0),
    )
    scheduler.set_timesteps(NUM_STEPS)
    pipe.denoise(inputs.latents, inputs.embeds, scheduler=scheduler, guidance=5.0, cache=CacheConfig.off())
    config = size.transformer
    width = config["attention_head_dim"] * config["num_attention_heads"]
    blocks = config["num_layers"] + config["num_single_layers"]
    expected, _ = exchanged(Split(2), size.num_image_tokens, size.num_text_tokens, width, blocks, 4, 0)
    assert sum(sent) == NUM_STEPS * expected, (sum(sent), NUM_STEPS * expected)
    if ranks.is_first:
        print(f"{expected} bytes a step")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

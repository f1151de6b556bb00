"""Training of the transformer: its balance, noise levels and learning rate, and that it can be killed at any step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hi_diffusers.families.hidream.moe import MoEGate
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from tests.training.tiny_runs import TRANSFORMER_SHAPE, assert_same_state, fake_latents, read_checkpoint
from training import train as training
from training.checkpoint import load_checkpoint, save_checkpoint
from training.latents import LatentPool, PromptReader
from training.scenes import CPU_TIER
from training.train import ExpertBalance, Trainer, TransformerRecipe, main, sample_sigmas, save, train

RECIPE = TransformerRecipe(steps=4, batch_size=2, warmup_steps=2)


@pytest.fixture(scope="module")
def text(tiny_folder: Path) -> PromptReader:
    return PromptReader.load(tiny_folder, "cpu")


@pytest.fixture
def make_trainer(text: PromptReader, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(training.TRANSFORMER, "cpu", TRANSFORMER_SHAPE)
    return lambda recipe=RECIPE: Trainer(recipe, fake_latents(), text, "cpu")


def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(make_trainer, tmp_path: Path) -> None:
    """Weights, average, both optimizers and both generators; what others draw meanwhile has no influence."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    train(make_trainer(), whole)

    interrupted = make_trainer()
    for _ in range(2):
        interrupted.train_step()
    save(interrupted, cut)
    resumed = make_trainer()
    torch.manual_seed(99)
    resumed.restore(load_checkpoint(cut / "checkpoint.pt", RECIPE))
    assert resumed.step == 2
    train(resumed, cut)
    assert_same_state(read_checkpoint(cut / "checkpoint.pt"), read_checkpoint(whole / "checkpoint.pt"))


def test_saving_on_the_way_changes_nothing(make_trainer, tmp_path: Path) -> None:
    (tmp_path / "often").mkdir(), (tmp_path / "once").mkdir()
    train(make_trainer(), tmp_path / "often", save_every=1)
    train(make_trainer(), tmp_path / "once")
    often, once = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("often", "once"))
    assert_same_state(often, once)


def test_the_exported_transformer_is_the_average_in_bf16(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    for _ in range(2):
        trainer.train_step()
    trainer.export(tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = HiDreamImageTransformer2DModel.from_pretrained(tmp_path).state_dict()
    weights = trainer.transformer.state_dict()
    assert loaded.keys() == trainer.average.keys()
    for name, value in trainer.average.items():
        assert torch.equal(stored[name], value.bfloat16()), name
        assert torch.equal(loaded[name], value.bfloat16().float()), name
    assert any(not torch.equal(value, weights[name]) for name, value in trainer.average.items())


def test_a_run_killed_before_its_last_export_exports_when_it_is_started_again(make_trainer, tmp_path: Path) -> None:
    """The transformer was written inside the loop over the steps that are left, of which there were none."""
    trainer = make_trainer()
    for _ in range(4):
        trainer.train_step()
    save_checkpoint(tmp_path / "checkpoint.pt", RECIPE, trainer.state())
    train(trainer, tmp_path)
    assert (tmp_path / "transformer" / "config.json").exists()


def test_the_loss_vanishes_for_a_network_that_returns_the_negative_velocity(make_trainer) -> None:
    """All latents are one half, so noisy latent and noise level tell the velocity. With the published sign flipped,
    training would go as well, and the pipeline would draw noise.
    """
    trainer = make_trainer()
    trainer.pool = LatentPool(CPU_TIER, 0, np.full((4, 4, 16, 16), 0.5, np.float16))

    def perfect(noisy: torch.Tensor, timesteps: torch.Tensor, *embeds: object, return_dict: bool) -> tuple:
        trainer.balance._losses().append(torch.ones(()))
        return ((0.5 - noisy) / (timesteps / 1000)[:, None, None, None],)

    trainer.transformer = perfect
    velocity, balance = trainer.loss(trainer.draw_batch())
    assert velocity < 1e-6 and balance == 1


def route_everything(num_activated: int, weight: torch.Tensor) -> float:
    model = nn.Sequential(MoEGate(4, 4, num_activated))
    balance = ExpertBalance(model)
    model[0].weight.data = weight
    model(torch.eye(4).repeat(5, 1))
    return balance.take().item()


@pytest.mark.parametrize("num_activated", [1, 2])
def test_balance_is_one_when_every_expert_gets_the_same(num_activated: int) -> None:
    # Token i prefers expert i, then expert i + 1.
    weight = 30 * torch.eye(4) + 10 * torch.eye(4).roll(1, 0)
    assert route_everything(num_activated, weight) == pytest.approx(1.0, abs=1e-3)


def test_balance_is_the_number_of_experts_when_one_takes_all() -> None:
    weight = torch.tensor([[30.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4])
    assert route_everything(1, weight) == pytest.approx(4.0, abs=1e-3)
    assert route_everything(2, weight) == pytest.approx(2.0, abs=1e-3)


def test_balance_is_a_mean_over_gates_and_not_collected_without_gradients() -> None:
    model = nn.Sequential(MoEGate(4, 4, 1))
    balance = ExpertBalance(model)
    with torch.no_grad():
        model(torch.eye(4))
    assert balance._losses() == []
    model(torch.eye(4)), model(torch.eye(4))
    single = balance._losses()[0]
    assert torch.equal(balance.take(), single) and balance._losses() == []


def test_a_batch_in_parts_has_the_gradients_of_the_whole(make_trainer) -> None:
    """The balance loss is a mean of shares and not of tokens, so it is left out."""
    gradients = []
    for parts in (1, 2):
        trainer = make_trainer(replace(RECIPE, batch_size=4, parts=parts, balance_weight=0.0))
        for module in trainer.transformer.modules():
            if hasattr(module, "adaLN_modulation"):  # at their zeros most gradients vanish
                nn.init.normal_(module.adaLN_modulation[1].weight, std=0.1)
        nn.init.normal_(trainer.transformer.final_layer.linear.weight, std=0.1)
        for part in trainer.draw_batch().split(parts):
            trainer.workers.submit(trainer._learn, part).result()
        gradients.append({name: p.grad for name, p in trainer.transformer.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, whole in gradients[0].items():
        assert (gradients[1][name] - whole).norm() < 1e-2 * whole.norm() + 1e-6, name


@pytest.mark.slow
def test_a_compiled_network_learns_what_the_plain_one_learns(make_trainer) -> None:
    plain, compiled = make_trainer(), make_trainer()
    training.compile_parts(compiled.transformer)
    losses = [[trainer.train_step()["loss"] for _ in range(2)] for trainer in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_noise_levels_lie_between_a_thousandth_and_one_and_reach_both_ends() -> None:
    sigmas = sample_sigmas(TransformerRecipe(), 20_000, torch.Generator().manual_seed(0))
    assert sigmas.shape == (20_000,)
    assert 1e-3 <= sigmas.min() < 0.01 and 0.99 < sigmas.max() <= 1
    # Logit-normal around sigmoid(0.6), but for the uniform tenth.
    assert sigmas.median() == pytest.approx(torch.tensor(0.6).sigmoid().item(), abs=0.02)
    uniform = sample_sigmas(TransformerRecipe(uniform_share=0.99), 20_000, torch.Generator().manual_seed(0))
    assert uniform.quantile(0.1) == pytest.approx(0.1, abs=0.02)


def test_noise_levels_repeat_with_their_generator() -> None:
    first, second = (sample_sigmas(RECIPE, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_learning_rates_follow_the_recipe(make_trainer) -> None:
    trainer = make_trainer(replace(RECIPE, decay_share=0.5))
    factors = [trainer.train_step()["lr_factor"] for _ in range(4)]
    assert factors == [0.5, 1.0, 1.0, 0.5]
    muon, adamw = (optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers)
    assert (muon, adamw) == (0.5 * RECIPE.muon_lr, 0.5 * RECIPE.adam_lr)


def test_muon_takes_the_matrices_of_blocks_and_adamw_all_the_rest(make_trainer) -> None:
    trainer = make_trainer()
    names = {id(parameter): name for name, parameter in trainer.transformer.named_parameters()}
    muon, adamw = ([names[id(p)] for p in optimizer.param_groups[0]["params"]] for optimizer in trainer.optimizers)
    assert sorted(muon + adamw) == sorted(names.values())
    assert any(".experts." in name for name in muon) and all("_stream_blocks." in name for name in muon)
    assert not any("adaLN" in name or ".gate." in name for name in muon)


def test_bad_input_is_refused_in_one_line_before_anything_is_written(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    vae, text = ["--vae", str(tiny_folder / "vae")], ["--text", str(tiny_folder)]
    for flags, reason in (
        (["--vae", str(tmp_path / "no"), *text], "--vae must be a folder that training wrote"),
        ([*vae, "--text", str(tmp_path)], "it has no text_encoder/config.json"),
        ([*vae, *text, "--steps", "0"], "steps must be above 0, got 0"),
        ([*vae, *text, "--save_every", "0"], "save_every must be above 0, got 0"),
        ([*vae, *text, "--device", "cuda:77"], "cuda:77"),
        (vae, "--text"),
    ):
        assert main([*flags, "--output", str(output)]) == 2
        err = capsys.readouterr().err
        assert reason in err and err.count("\n") == 1
    assert not output.exists()


def test_a_checkpoint_of_another_recipe_is_refused_before_pictures_are_drawn(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "checkpoint.pt", TransformerRecipe(), {})
    flags = ["--vae", str(tiny_folder / "vae"), "--text", str(tiny_folder), "--output", str(tmp_path)]
    assert main([*flags, "--batch_size", "4"]) == 2
    assert "batch_size is 64 there and 4 here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("setting", [{"tier": "moon"}, {"steps": 0}, {"ema": 1.0}, {"seed": -1}, {"batch_size": 3}])
def test_a_recipe_refuses_values_that_make_no_sense(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        TransformerRecipe(**setting)

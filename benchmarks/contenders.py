"""What is compared: the reference samplers, and every way to draw with a budget."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.published import PUBLISHED, Published
from cache_functions import CacheConfig, schedule_names
from cache_functions.config import ON_LATENTS
from hi_diffusers import SamplingOptions
from taylor_utils import basis_names

BUDGETS = (25, 17, 13, 10, 8, 7, 6, 5)
FEW_BUDGETS = (13, 8)
GUIDANCES = (2.0, 4.0, 5.0)
HELD_OUT, DRAWBENCH = "held-out prompts", "DrawBench"
SMALL = 14  # above it all rules are good, and only the default and its nearest rivals are drawn


@dataclass(frozen=True)
class Block:
    """One table: what is drawn uncached as the reference.

    Attributes:
        name: of the block.
        model: preset.
        scheduler: None is the preset's.
        guidance: None is the preset's.
        budgets: numbers of full steps.
        prompts: HELD_OUT: of the world that the model was taught; DRAWBENCH: of any other.
    """

    name: str
    model: str
    scheduler: str | None = None
    guidance: float | None = None
    budgets: tuple[int, ...] = BUDGETS
    prompts: str = HELD_OUT

    def options(self, **changes: Any) -> SamplingOptions:
        """Of every picture, but for prompt and seed."""
        return SamplingOptions(prompt="", **({"scheduler": self.scheduler, "guidance": self.guidance} | changes))


@dataclass(frozen=True)
class Method:
    """One way to draw with a budget.

    Attributes:
        name: of the row.
        cache: budget -> configuration; None where it cannot make that budget.
        sampler: budget -> options that differ from the block's, for drawing with fewer steps.
        largest: budget that it is drawn with.
        published: draws it, if it is no setting of ours.
    """

    name: str
    cache: Callable[[int], CacheConfig | None]
    sampler: Callable[[int], dict[str, Any]] = lambda budget: {}
    largest: int = SMALL
    published: Published | None = None


def blocks() -> tuple[Block, ...]:
    """The tables."""
    return (
        *(Block("unipc", "nano", guidance=guidance) for guidance in GUIDANCES),
        *(Block("unipc, DrawBench", "nano", guidance=guidance, prompts=DRAWBENCH) for guidance in GUIDANCES),
        *(
            Block("euler", "nano", scheduler="euler", guidance=guidance, budgets=FEW_BUDGETS)
            for guidance in GUIDANCES[:2]
        ),
        Block("nano-dev", "nano-dev", budgets=(14, 10, 7, 5)),
        Block("nano-fast", "nano-fast", budgets=(8, 6, 4)),
    )


def uniform(**settings: Any) -> Callable[[int], CacheConfig | None]:
    """A rule on the paper's schedule, at the budgets that it makes."""
    return lambda budget: CacheConfig(full_steps=budget, **settings)


def curved(schedule: str, **settings: Any) -> Callable[[int], CacheConfig | None]:
    """A rule on a schedule that makes any budget."""
    return lambda budget: CacheConfig(schedule=schedule, full_steps=budget, **settings)


def methods(renoises: bool) -> list[Method]:
    """The rows: fewer steps, the peers as they are published, fixed formulas on each target, and the default."""
    off, hermite = CacheConfig.off(), {"basis": "hermite", "max_order": 1}
    everywhere: dict[str, Any] = {"largest": max(BUDGETS)}
    if renoises:
        rows = [
            Method("fewer steps", lambda _: off, lambda budget: {"num_steps": budget}, **everywhere),
            Method("x0, reuse", uniform(target="x0", basis="reuse", max_order=0)),
        ]
    else:
        rows = [
            Method(f"fewer steps, {name}", lambda _: off, partial(_fewer_steps, scheduler), **everywhere)
            for name, scheduler in (("UniPC", "unipc"), ("Euler", "euler"))
        ]
        rows += [
            Method("FORA: module, reuse", uniform(target="module", basis="reuse", max_order=0)),
            Method("TaylorSeer: module, taylor 1", uniform(target="module", max_order=1), **everywhere),
            Method("TaylorSeer: module, taylor 2", uniform(target="module", max_order=2)),
            Method("HiCache: module, hermite 2", uniform(target="module", basis="hermite", max_order=2, sigma=0.5)),
        ]
    for target in ("x0",) if renoises else ON_LATENTS:
        rows += [
            Method(f"{target}, taylor 1", uniform(target=target, max_order=1), **everywhere),
            Method(f"{target}, hermite 1", uniform(target=target, **hermite), **everywhere),
        ]
    if not renoises:
        rows += [Method(name, lambda _: off, published=one) for name, one in PUBLISHED.items()]
    rows.append(Method("x0, learned weights, uniform", uniform(target="x0", basis="learned", max_order=2)))
    if not renoises:
        rows += [Method(f"best of {target}", partial(_best_of, target), **everywhere) for target in ON_LATENTS]
    return [*rows, Method("best", CacheConfig.best, **everywhere)]


def outside(method: Method) -> bool:
    """Whether a row is drawn of DrawBench's prompts, too: the default, and what it must not be behind."""
    return method.name in (
        "fewer steps, UniPC",
        "TaylorSeer: module, taylor 1",
        "velocity, taylor 1",
        "velocity, hermite 1",
        *(f"best of {target}" for target in ON_LATENTS),
        "best",
    )


def _best_of(target: str, budget: int) -> CacheConfig:
    return replace(CacheConfig.best(budget), target=target)


def _fewer_steps(scheduler: str, budget: int) -> dict[str, Any]:
    return {"num_steps": budget, "scheduler": scheduler}


def screened() -> list[Method]:
    """Every target with every basis that needs no calibration, on every schedule that needs none."""
    orders = {"reuse": (0,), "taylor": (1, 2), "hermite": (1, 2), "newton": (1, 2)}
    assert {*orders, "learned"} == set(basis_names())
    rows = []
    for target in ("module", "residual", "velocity", "x0"):
        for basis, max_orders in orders.items():
            for order in max_orders:
                for schedule in schedule_names():
                    if schedule == "mask":  # needs a calibration
                        continue
                    make = uniform if schedule == "interval" else (lambda schedule=schedule, **s: curved(schedule, **s))
                    exponent = {"exponent": 1.5} if schedule == "power" else {}
                    cache = make(target=target, basis=basis, max_order=order, **exponent)
                    rows.append(Method(f"{target}, {basis} {order}, {schedule}", cache))
    return rows

"""A script whose pictures are drawn by several processes of torchrun: one of them works, the others follow it."""

import argparse
import os
import signal
from collections.abc import Callable, Mapping

from hi_diffusers.console import Refusal, mute, name_flag
from hi_diffusers.denoising.ranks import Ranks, join
from hi_diffusers.engine.following import follow
from hi_diffusers.engine.session import Session
from hi_diffusers.flags import split_from
from hi_diffusers.request.placement import resolve_device


def mute_followers(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> None:
    """Let the first process of each group alone say what is refused, and what is done; raises ValueError for flags."""
    rank = environment.get("RANK", "0")
    if rank.isdecimal() and int(rank) % split_from(args).size:
        mute()


def work_together(args: argparse.Namespace, device: str, work: Callable[[Ranks | None, str], None]) -> None:
    """Do a script's work in the first process of each group, and carry out its orders in the others.

    Args:
        args: the flags, which say how a picture is split; over one process: `work` is done with None.
        device: the device that was asked for.
        work: is given the ranks, and its own device.

    Raises:
        Refusal: if there are not as many processes, or GPUs.
        KeyboardInterrupt: in a follower whose first process ended after Ctrl-C or SIGTERM.
    """
    split = split_from(args)
    if split.size == 1:
        work(None, device)
        return
    try:
        ranks, own = join(split, str(resolve_device(device)))
    except ValueError as error:
        raise Refusal(name_flag(str(error), args)) from error
    try:
        if ranks.is_first:
            work(ranks, own)
        else:
            _follow(ranks, own)
    finally:
        ranks.leave()


def share(session: Session, ranks: Ranks | None, device: str) -> None:
    """Let a session draw with the ranks, if there are any."""
    if ranks is not None:
        session.share_with(ranks, device)


def _follow(ranks: Ranks, device: str) -> None:
    """Follow the first process, which decides when a signal ends all."""
    caught: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: caught.append(number))
    try:
        follow(ranks, device)
    except RuntimeError:
        if caught:
            raise KeyboardInterrupt from None
        raise

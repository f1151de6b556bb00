"""What everything that uses a Ray cluster needs: to know early whether it is there."""

import socket

from hi_diffusers.console import require


def check_reachable(address: str | None) -> None:
    """Raise ValueError if Ray is not installed or the cluster cannot be reached; Ray itself retries for minutes."""
    require("ray", "ray", "engine ray")
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):  # none, "auto", "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"ray_address must be the address of a running cluster, got {address}: {error}") from error


def connect(address: str | None) -> None:
    """Connect this process to a cluster; None starts one on this machine.

    Raises:
        ValueError: see `check_reachable`.
    """
    import ray

    check_reachable(address)
    local = {"include_dashboard": False} if address is None else {}
    ray.init(address=address or "local", log_to_driver=False, **local)

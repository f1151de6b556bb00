"""Which sites may talk to a server: its own, and those that the server's owner names.

A browser sends a user's cookie with whatever any site asks of the page. So a request of another site's script is
refused by its Origin header, and one that reaches this machine under a stranger's name (DNS rebinding) by its Host
header: an address of digits cannot be rebound, a name must be known.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
LOCAL_NAMES = ("localhost",)
SHARED = ".gradio.live"  # the names of gradio's public links
SAME_SITE = re.compile(rb";\s*samesite=\w+", re.IGNORECASE)


@dataclass(frozen=True)
class Origins:
    """The hosts and origins that are served.

    Attributes:
        hosts: names by which the page is reached, without a port; addresses of digits and localhost always are.
        origins: other sites whose scripts may use the page, e.g. "https://example.org".
        share: whether the page has a public link of gradio's.
    """

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    share: bool = False

    def __post_init__(self) -> None:
        for origin in self.origins:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.path:
                raise ValueError(f"allow_origin must be a site such as https://example.org, got {origin!r}")

    def fault(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Why a request with these headers is refused; None if it is not."""
        found = {name.lower(): value.decode("latin-1") for name, value in headers}
        host, origin = found.get(b"host", ""), found.get(b"origin")
        if not self._is_known(host):
            return "this name is not served here: the server's owner can give it with --allowed_host"
        if origin is None or origin in self.origins:
            return None
        if urlsplit(origin).netloc.lower() != host.lower():
            return "requests of other sites' pages are not served: the server's owner can give one with --allow_origin"
        return None

    def _is_known(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in (*LOCAL_NAMES, *(one.lower() for one in self.hosts)) or (self.share and name.endswith(SHARED)):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_certificate(ssl_certfile: Path | None, ssl_keyfile: Path | None) -> None:
    """Raise ValueError unless both files of a certificate are given and there, or none."""
    if (ssl_certfile is None) != (ssl_keyfile is None):
        raise ValueError("ssl_certfile and ssl_keyfile must be given together")
    for name, path in (("ssl_certfile", ssl_certfile), ("ssl_keyfile", ssl_keyfile)):
        if path is not None and not path.is_file():
            raise ValueError(f"{name} must be a file, got {path}")


def same_site(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """A response's headers, with cookies that other sites' requests do not carry (SameSite=Lax)."""
    return [
        (name, SAME_SITE.sub(b"", value) + b"; SameSite=Lax" if name.lower() == b"set-cookie" else value)
        for name, value in headers
    ]

"""Who may ask the board: its own page, from this machine, or with the token.

- A request has to name the board's own host: another site's name that leads to 127.0.0.1 does not
  open it (DNS rebinding).
- A request that changes something has to come from the board's page: a form of another site cannot
  send JSON, and says its own Origin.
- With a token every request needs it, as a cookie that the first address brings along.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import NamedTuple
from urllib.parse import urlsplit

COOKIE = "qwen2_ascend_board"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Every answer has them: the page loads nothing from elsewhere and runs nobody else's code."""


class Refusal(NamedTuple):
    """Why a request is not answered."""

    status: int
    reason: str


class Access:
    """What a request needs.

    Args:
        host: the board's address.
        token: None where none is asked for.
    """

    def __init__(self, host: str, token: str | None) -> None:
        self.token = token
        self._is_loopback = is_loopback(host)

    def refusal(
        self, method: str, headers: Mapping[str, str], query_token: str | None
    ) -> Refusal | None:
        """Why a request is refused, or None.

        Args:
            method: HTTP's method.
            headers: with small letters.
            query_token: what the address brings along.
        """
        host = headers.get("host", "")
        if self._is_loopback and _name(host) not in LOOPBACK_NAMES:
            return Refusal(421, "this board answers to localhost and 127.0.0.1 only.")
        if method != "GET":
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != host:
                return Refusal(403, "the request comes from the page of another site.")
            if not headers.get("content-type", "").startswith("application/json"):
                return Refusal(415, "the request has to be JSON.")
        if self.token is not None and not _is_known(self.token, headers, query_token):
            return Refusal(401, "open the address with the token that the board printed.")
        return None


def _is_known(token: str, headers: Mapping[str, str], query_token: str | None) -> bool:
    given = (query_token, _cookie(headers.get("cookie", "")))
    own = token.encode()
    return any(hmac.compare_digest(one.encode("utf-8", "replace"), own) for one in given if one)


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


def _cookie(header: str) -> str | None:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return None
    return found.value if found else None

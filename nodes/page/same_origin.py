"""Whether a request that changes something was sent by ComfyUI's own page. Any page that a browser shows can post to
a server on this machine, and a name that its owner points at this machine passes for the same site; ComfyUI's own
check, which runs before this one, lets pages without an origin and such names through."""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}
PRIVATE_DOMAINS = (".localhost", ".local", ".lan", ".home.arpa", ".internal", ".localdomain")  # nobody can buy one


def only_from_own_page(handler):
    """The handler, behind a 403 for requests from elsewhere."""

    @functools.wraps(handler)
    async def checked(request):
        from aiohttp import web

        if problem := find_origin_problem(request.headers, read_allowed_origin()):
            return web.json_response({"error": f"{problem} Nothing was changed."}, status=403)
        return await handler(request)

    return checked


def find_origin_problem(headers: Mapping[str, str], allowed_origin: str = "") -> str:
    """Why this request is refused, in sentences; empty when it is not. `allowed_origin`: one more that the user trusts
    in --enable-cors-header."""
    site, origin, host = (headers.get(name) for name in ("Sec-Fetch-Site", "Origin", "Host"))
    if origin and origin == allowed_origin:
        return ""
    if site not in (None, "same-origin"):
        return f"The request comes from another site (Sec-Fetch-Site is {site!r})."
    if origin is None and site is None:
        return (
            "The request does not say where it comes from. A browser does; a script sends the header Origin with the "
            "address of this server, such as http://127.0.0.1:8188."
        )
    if origin is not None and split_origin(origin) != split_host(host, origin):
        return f"The request comes from {origin!r}, and this server was asked as {host!r}."
    if not (origin or "").startswith("https:") and not is_own_name(split_host(host, "http:")[0]):
        return (
            f"This server was asked as {host!r}, a name that anybody could have pointed at it. Open ComfyUI by "
            "localhost, by an IP address, by this machine's name or over https."
        )
    return ""


def split_origin(origin: str) -> tuple[str, int | None]:
    """(name, port) of an Origin header; ("", None) for "null" and for nonsense."""
    try:
        parts = urlsplit(origin)
        name, port = parts.hostname, parts.port
    except ValueError:
        return "", None
    return (name, port or DEFAULT_PORTS[parts.scheme]) if name and parts.scheme in DEFAULT_PORTS else ("", None)


def split_host(host: str | None, origin: str) -> tuple[str, int | None]:
    """(name, port) of a Host header, with the port that the origin's scheme has by itself."""
    scheme = "https" if origin.startswith("https:") else "http"
    name, port = split_origin(f"{scheme}://{host}") if host else ("", None)
    return (name, port) if name else ("", -1)  # equal to no origin


def is_own_name(name: str) -> bool:
    """Whether only this machine or its own network can be meant by the name."""
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        pass
    return bool(name) and ("." not in name or name.endswith(PRIVATE_DOMAINS) or name == socket.gethostname().lower())


def read_allowed_origin() -> str:
    """The one origin of --enable-cors-header; empty without it, and for *, which is everybody."""
    from comfy.cli_args import args

    allowed = args.enable_cors_header
    return allowed if isinstance(allowed, str) and allowed != "*" else ""

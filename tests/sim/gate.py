"""Who a simulated registry lets in, and its token service."""

from __future__ import annotations

import base64
import secrets
import time
from dataclasses import dataclass
from urllib.parse import parse_qs

from aiohttp import web


@dataclass
class Auth:
    """How the registry lets clients in. Without a user, bearer tokens are given to anybody."""

    kind: str  # basic or bearer
    user: str | None = None
    password: str = ""
    identity_token: str | None = None
    token_ttl_s: float = 300.0


class Gate:
    """Checks Authorization, and hands out bearer tokens."""

    def __init__(self, auth: Auth | None) -> None:
        self.auth = auth
        self.tokens: dict[str, float] = {}  # token -> end, in time.monotonic()
        self.realm = ""
        self.refusal_status = 401
        """For wrong credentials; none at all get 401 always."""

    def refusal(self, request: web.Request, scope: str = "") -> web.Response | None:
        """A 401 with a challenge; None lets the request in."""
        auth = self.auth
        if auth is None:
            return None
        sent = request.headers.get("Authorization", "")
        if auth.kind == "basic":
            if auth.user is not None and sent == _basic(auth.user, auth.password):
                return None
            challenge = 'Basic realm="simulator"'
        else:
            if self.tokens.get(sent.removeprefix("Bearer "), 0.0) > time.monotonic():
                return None
            challenge = f'Bearer realm="{self.realm}",service="simulator"'
            if scope:
                challenge += f',scope="{scope}"'
        return web.json_response(
            {"errors": [{"code": "UNAUTHORIZED"}]},
            status=self.refusal_status if sent else 401,
            headers={"WWW-Authenticate": challenge},
        )

    async def token(self, request: web.Request) -> web.Response:
        """The token service: GET with basic credentials, or POST with an identity token."""
        auth = self.auth
        if auth is None or auth.kind != "bearer":
            return web.Response(status=404)
        if request.method == "POST":
            form = {k: v[0] for k, v in parse_qs(await request.text()).items()}
            allowed = auth.identity_token is not None and form.get("refresh_token") == auth.identity_token
        else:
            sent = request.headers.get("Authorization")
            allowed = auth.user is None or sent == _basic(auth.user, auth.password)
        if not allowed:
            return web.Response(status=401)
        token = secrets.token_urlsafe(24)
        self.tokens[token] = time.monotonic() + auth.token_ttl_s
        return web.json_response({"token": token, "expires_in": int(auth.token_ttl_s)})


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

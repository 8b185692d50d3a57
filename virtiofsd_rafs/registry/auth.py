"""Authentication with a registry: anonymous, basic, or bearer from a token service. No I/O, time is an
argument.

An ``Authenticator`` is asked ``plan(now)`` before each request: it answers with the header to send, or with a
token request to make first. After a 401 it gets ``refused(...)``, and is asked again. Anonymous comes first
always: credentials are sent only after the registry asked for them, and only in the way that it asked for.

A token is renewed while it is still good: ``plan`` then answers with the header *and* with the token request
that may run beside the request, so that nobody waits for it. Credentials that were refused are not sent again
for a while, unless they change: directories lock accounts after a few wrong passwords.

Source: distribution-spec "Authentication"; docker's token protocol (distribution, docs/spec/auth/token.md and
oauth.md).
"""

from __future__ import annotations

import base64
import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

import attrs

from virtiofsd_rafs.errors import AuthError, BadReply, ConfigError
from virtiofsd_rafs.registry.protocol import ReplyHead, check_ok, origin, without_query
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from virtiofsd_rafs.registry.challenge import Challenge

CLIENT_ID = "virtiofsd-rafs"
# Token bodies hold one JWT or two; the largest known are some 10 KiB (many groups in one claim).
MAX_TOKEN_BODY = 1 << 20
# The token protocol's default when expires_in is missing.
DEFAULT_TOKEN_TTL_S = 60.0
# Shorter lives are no lives: each request would be two.
MIN_TOKEN_TTL_S = 1.0
# A token is renewed this long before it ends, at most a third of its life: time enough for some tries.
RENEW_AHEAD_S = 60.0
# A renewal ahead of time that failed is tried again after this long, at most a tenth of the token's life.
RENEW_PAUSE_S = 2.0
# A token is no longer sent this long before it ends (it has to travel), at most a tenth of its life.
LAST_USE_S = 2.0
# How long refused credentials are not sent again.
REFUSED_PAUSE_S = 10.0
# How often one request may be refused with 401: the anonymous try, an expired token, the race after a
# renewal.
MAX_REFUSALS = 3

_LOGIN = (
    "log in with `docker login`, or point DOCKER_CONFIG at a config.json that has the registry under `auths`"
)


@attrs.frozen
class Credentials:
    """What there is for one registry: a password, or an identity token (OAuth2 refresh token)."""

    username: str
    password: Secret
    identity_token: Secret | None = None

    def basic(self) -> Secret:
        """The value of a basic Authorization header."""
        pair = f"{self.username}:{self.password.reveal()}".encode()
        return Secret("Basic " + base64.b64encode(pair).decode())


def credentials_of(auth: Secret, what: str) -> Credentials:
    """The credentials in *auth*, the base64 of ``user:password``; *what* names them in the error.

    Raises ConfigError, which never shows them.
    """
    try:
        username, colon, password = base64.b64decode(auth.reveal(), validate=True).decode().partition(":")
    except ValueError:
        colon = username = password = ""
    if not colon:
        # Without the cause: its text could show a part of the value.
        raise ConfigError(f"{what} is no base64 of user:password", remedy="write what `docker login` writes")
    return Credentials(username, Secret(password.rstrip("\0")))


@attrs.frozen
class TokenRequest:
    """A request to a token service: GET, or POST with ``form`` when it is not None."""

    url: str
    authorization: Secret | None
    form: Secret | None

    @property
    def where(self) -> str:
        """The URL as a message may show it."""
        return without_query(self.url)


@attrs.frozen
class Ready:
    """Send the request with this Authorization (None: without)."""

    authorization: Secret | None
    renew: TokenRequest | None = None
    """To be made beside it: the token ends soon."""


class Authenticator:
    """The state of authentication for one repository and one set of actions.

    Args:
        endpoint_url: any URL of the registry, for its scheme and for messages.
        scope: ``repository:<name>:pull`` or ``...:pull,push``.
        credentials: what the user has for this registry, or None; see also ``use``.
        token: a bearer token that is sent from the first request on, until it is refused.
    """

    def __init__(
        self,
        endpoint_url: str,
        scope: str,
        credentials: Credentials | None = None,
        *,
        token: Secret | None = None,
    ) -> None:
        self._scheme, self._host, _ = origin(endpoint_url)
        self._scope = scope
        self._credentials = credentials
        self._origin = ""
        self._given_token = token
        self._mode: str | None = None
        self._realm = ""
        self._service = ""
        self._scopes: tuple[str, ...] = (scope,)
        self._token: Secret | None = None
        self._renew_at = 0.0
        self._last_use = 0.0
        self._form_works = True
        self._refusal: AuthError | None = None
        self._refused_until = 0.0

    @property
    def credentials(self) -> Credentials | None:
        """What is used now."""
        return self._credentials

    def use(self, credentials: Credentials | None, *, origin: str = "") -> bool:
        """Uses *credentials*, which *origin* (for messages) gave, from now on; whether they are new.

        A token that was had with others stays good until it is refused.
        """
        self._origin = origin
        if credentials == self._credentials:
            return False
        self._credentials = credentials
        self._refusal = None
        self._form_works = True
        if self._mode == "basic" and credentials is None:
            self._mode = None
        return True

    def use_token(self, token: Secret | None) -> None:
        """Sends *token* as it is from now on; None: no longer."""
        self._given_token = token
        self._refusal = None

    def plan(self, now: float) -> Ready | TokenRequest:
        """What to do before the next request at *now* (seconds of any steady clock).

        Raises AuthError while refused credentials are not sent again.
        """
        if self._given_token is not None:
            return Ready(self._given())
        if self._mode == "bearer" and self._token is not None and now < self._last_use:
            return Ready(self._token, None if now < self._renew_at else self._token_request())
        if self._refusal is not None and now < self._refused_until:
            raise self._refusal
        if self._mode == "basic" and self._credentials is not None:
            return Ready(self._credentials.basic())
        return self._token_request() if self._mode == "bearer" else Ready(None)

    def _given(self) -> Secret | None:
        given = self._given_token
        return None if given is None else Secret(f"Bearer {given.reveal()}")

    def renewal_failed(self, now: float) -> None:
        """A renewal ahead of time did not work at *now*: the next one has to wait."""
        self._renew_at = now + min(RENEW_PAUSE_S, (self._last_use - now) / 3)

    def refused(
        self, used: Secret | None, challenges: list[Challenge], *, refusals: int, now: float = 0.0
    ) -> None:
        """Takes note of a 401 for a request that carried *used*; *refusals* counts them for this request,
        from 1.

        Raises AuthError when asking again would not help, unless ``use`` brings other credentials.
        """
        offered = {c.scheme: c for c in reversed(challenges)}
        if used is not None and self._given_token is not None:
            if used == self._given():
                self._given_token = None
            if not offered:
                raise self.refusal("it refuses the token that it was given")
        if refusals >= MAX_REFUSALS:
            raise self.refusal("it refuses what it was given")
        if "bearer" in offered:
            self._take_bearer(offered["bearer"], used)
        elif "basic" in offered:
            if self._credentials is None or not self._credentials.password:
                raise self.refusal("it asks for a user and a password")
            if used == self._credentials.basic():
                raise self._not_again("it refuses the user and password", now)
            self._mode = "basic"
        else:
            schemes = ", ".join(sorted(offered)) or "none"
            raise self.refusal(f"it offers no way that is known here (offered: {schemes})")

    def token_reply(
        self, request: TokenRequest, head: ReplyHead, body: bytes, *, now: float, wall: float
    ) -> bool:
        """Keeps the token in *body*, and returns whether there was one: else ``plan`` knows another request.

        *now*: the clock of ``plan``; *wall*: seconds since the epoch.
        Raises AuthError, Throttled, Unreachable or BadReply, by status and body.
        """
        if request.form is not None and head.status in (404, 405):
            # Not every token service has the OAuth2 form; the identity token is then good for nothing, but
            # an account with a password as well still is.
            self._form_works = False
            return False
        if head.status in (400, 401, 403):
            raise self._not_again(f"its token service {request.where} refuses ({head.status})", now)
        check_ok(head, (200,), f"token service {request.where}", now=wall)
        reply = _json_object(body, f"token service {request.where}")
        token = reply.get("token") or reply.get("access_token")
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise BadReply(f"token service {request.where} sent no usable token")
        ttl = _token_ttl(reply, wall)
        self._refusal = None
        self._token = Secret(f"Bearer {token}")
        self._renew_at = now + ttl - min(RENEW_AHEAD_S, ttl / 3)
        self._last_use = now + ttl - min(LAST_USE_S, ttl / 10)
        return True

    def is_current(self, used: Secret | None) -> bool:
        """Whether *used* is what would be sent now."""
        basic = self._credentials.basic() if self._mode == "basic" and self._credentials else None
        return used in (self._token, basic, self._given())

    def forget_token(self, used: Secret | None) -> None:
        """The token that was *used* is of no use, although it was not refused as such."""
        if used == self._token:
            self._token = None

    def _take_bearer(self, challenge: Challenge, used: Secret | None) -> None:
        realm = challenge.params.get("realm", "")
        scheme, _, _ = origin(realm)
        if scheme != "https" and self._scheme == "https":
            raise self.refusal(f"its token service {without_query(realm)} is not encrypted")
        if "@" in urlsplit(realm).netloc:
            raise self.refusal("its token service has a user name in its URL")
        self._mode = "bearer"
        self._realm, self._service = realm, challenge.params.get("service", "")
        asked = challenge.params.get("scope", "")
        self._scopes = tuple(dict.fromkeys((self._scope, *([asked] if asked else []))))
        if used == self._token:
            self._token = None

    def _token_request(self) -> TokenRequest:
        credentials = self._credentials
        if credentials is not None and credentials.identity_token is not None and self._form_works:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": credentials.identity_token.reveal(),
                "service": self._service,
                "client_id": CLIENT_ID,
                "scope": " ".join(self._scopes),
            }
            return TokenRequest(self._realm, None, Secret(urlencode(form)))
        query: list[tuple[str, str]] = [("service", self._service)] if self._service else []
        query += [("scope", s) for s in self._scopes]
        authorization = None
        if credentials is not None and credentials.password:
            query.append(("account", credentials.username))
            authorization = credentials.basic()
        joiner = "&" if urlsplit(self._realm).query else "?"
        return TokenRequest(f"{self._realm}{joiner}{urlencode(query, quote_via=quote)}", authorization, None)

    def _not_again(self, why: str, now: float) -> AuthError:
        self._refusal = self.refusal(why)
        self._refused_until = now + REFUSED_PAUSE_S
        return self._refusal

    def refusal(self, why: str) -> AuthError:
        """The error that says so, and where the credentials came from."""
        had = f" (they come from {self._origin})" if self._origin and self._credentials is not None else ""
        return AuthError(f"{self._host} does not let us in: {why}{had}", remedy=_LOGIN)


def _token_ttl(reply: dict[str, Any], wall: float) -> float:
    ttl = reply.get("expires_in")
    seconds = float(ttl) if isinstance(ttl, (int, float)) and 0 < ttl < 10**9 else DEFAULT_TOKEN_TTL_S
    issued = reply.get("issued_at")
    if isinstance(issued, str):
        try:
            age = wall - datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", issued)).timestamp()
        except (ValueError, OverflowError):
            age = 0.0
        # A token that is old when it comes (a caching service) ends earlier; a clock that differs by more
        # than its life tells nothing.
        if 0 < age < seconds:
            seconds -= age
    return max(seconds, MIN_TOKEN_TTL_S)


def _json_object(body: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise BadReply(f"{what} sent no JSON") from e
    if not isinstance(value, dict):
        raise BadReply(f"{what} sent no JSON object")
    return value

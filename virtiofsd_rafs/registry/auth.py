"""Authentication with a registry: anonymous, basic, or bearer from a token service. No I/O, time is an
argument.

An ``Authenticator`` is asked ``plan(now)`` before each request: it answers with the header to send, or with a
token request to make first. After a 401 it gets ``refused(...)``, and is asked again. Anonymous comes first
always: credentials are sent only after the registry asked for them, and only in the way that it asked for.

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

from virtiofsd_rafs.errors import AuthError, BadReply
from virtiofsd_rafs.registry.protocol import ReplyHead, check_ok, origin, without_query
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtiofsd_rafs.registry.challenge import Challenge

CLIENT_ID = "virtiofsd-rafs"
# Token bodies hold one JWT or two; the largest known are some 10 KiB (many groups in one claim).
MAX_TOKEN_BODY = 1 << 20
# The token protocol's default when expires_in is missing.
DEFAULT_TOKEN_TTL_S = 60.0
# A token is renewed this long before it ends, at most a quarter of its life.
RENEW_AHEAD_S = 20.0
# How often one request may be refused with 401: the anonymous try, an expired token, the race after a
# renewal.
MAX_REFUSALS = 3

_LOGIN = (
    "log in with `docker login`, or point DOCKER_CONFIG at a config.json that has the registry under `auths`"
)


@attrs.frozen
class Credentials:
    """What config.json holds for one registry: a password or an identity token (OAuth2 refresh token)."""

    username: str
    password: Secret
    identity_token: Secret | None = None

    def basic(self) -> Secret:
        """The value of a basic Authorization header."""
        pair = f"{self.username}:{self.password.reveal()}".encode()
        return Secret("Basic " + base64.b64encode(pair).decode())


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


class Authenticator:
    """The state of authentication for one repository and one set of actions.

    Args:
        endpoint_url: any URL of the registry, for its scheme and for messages.
        scope: ``repository:<name>:pull`` or ``...:pull,push``.
        credentials: what the user has for this registry, or None.
        helper: name of a credential helper that config.json wants asked; only for the message.
    """

    def __init__(
        self, endpoint_url: str, scope: str, credentials: Credentials | None, *, helper: str | None = None
    ) -> None:
        self._scheme, self._host, _ = origin(endpoint_url)
        self._scope = scope
        self._credentials = credentials
        self._helper = helper
        self._mode: str | None = None
        self._realm = ""
        self._service = ""
        self._scopes: tuple[str, ...] = (scope,)
        self._token: Secret | None = None
        self._renew_at = 0.0
        self._form_works = True

    def plan(self, now: float) -> Ready | TokenRequest:
        """What to do before the next request at *now* (seconds of any steady clock)."""
        if self._mode == "basic" and self._credentials is not None:
            return Ready(self._credentials.basic())
        if self._mode == "bearer":
            if self._token is not None and now < self._renew_at:
                return Ready(self._token)
            return self._token_request()
        return Ready(None)

    def refused(self, used: Secret | None, challenges: list[Challenge], *, refusals: int) -> None:
        """Takes note of a 401 for a request that carried *used*; *refusals* counts them for this request,
        from 1.

        Raises AuthError when asking again would not help.
        """
        offered = {c.scheme: c for c in reversed(challenges)}
        if refusals >= MAX_REFUSALS:
            raise self._hopeless("it refuses what it was given")
        if "bearer" in offered:
            self._take_bearer(offered["bearer"], used)
        elif "basic" in offered:
            if self._credentials is None or not self._credentials.password:
                raise self._hopeless("it asks for a user and a password")
            if used == self._credentials.basic():
                raise self._hopeless("it refuses the user and password")
            self._mode = "basic"
        else:
            schemes = ", ".join(sorted(offered)) or "none"
            raise self._hopeless(f"it offers no way that is known here (offered: {schemes})")

    def token_reply(
        self, request: TokenRequest, head: ReplyHead, body: bytes, *, now: float, wall: float
    ) -> None:
        """Keeps the token in *body*. *now*: the clock of ``plan``; *wall*: seconds since the epoch.

        Raises AuthError, Throttled, Unreachable or BadReply, by status and body.
        """
        if request.form is not None and head.status in (404, 405):
            # Not every token service has the OAuth2 form; the identity token is then good for nothing, but
            # an account with a password as well still is.
            self._form_works = False
            return
        if head.status in (400, 401, 403):
            raise self._hopeless(f"its token service {request.where} refuses ({head.status})")
        check_ok(head, (200,), f"token service {request.where}", now=wall)
        reply = _json_object(body, f"token service {request.where}")
        token = reply.get("token") or reply.get("access_token")
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise BadReply(f"token service {request.where} sent no usable token")
        ttl = _token_ttl(reply, wall)
        self._token = Secret(f"Bearer {token}")
        self._renew_at = now + ttl - min(RENEW_AHEAD_S, ttl / 4)

    def _take_bearer(self, challenge: Challenge, used: Secret | None) -> None:
        realm = challenge.params.get("realm", "")
        scheme, _, _ = origin(realm)
        if scheme != "https" and self._scheme == "https":
            raise self._hopeless(f"its token service {without_query(realm)} is not encrypted")
        if "@" in urlsplit(realm).netloc:
            raise self._hopeless("its token service has a user name in its URL")
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

    def _hopeless(self, why: str) -> AuthError:
        remedy = _LOGIN
        if self._helper:
            remedy = (
                f"config.json names the credential helper {self._helper!r}, which is not asked; "
                "put the registry under `auths`"
            )
        return AuthError(f"{self._host} does not let us in: {why}", remedy=remedy)


@attrs.frozen
class DockerConfig:
    """The part of docker's config.json that concerns registries."""

    auths: Mapping[str, Credentials] = attrs.field(factory=dict)
    helpers: Mapping[str, str] = attrs.field(factory=dict)
    default_helper: str | None = None

    def lookup(self, host: str) -> Credentials | None:
        """The credentials for the registry *host*, as ``Reference.host`` names it."""
        return self.auths.get(_config_host(host))

    def helper(self, host: str) -> str | None:
        """The credential helper that *host* would be asked from."""
        return self.helpers.get(_config_host(host)) or self.default_helper


def parse_docker_config(data: bytes) -> DockerConfig:
    """The registries in a config.json. Entries without credentials (``{}``) count as none.

    Raises AuthError when it is no JSON object or an ``auth`` is no base64 of user:password. The message never
    shows the value.
    """
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise AuthError("docker's config.json is no JSON", remedy="mend it, or log in again") from e
    if not isinstance(config, dict):
        raise AuthError("docker's config.json is no JSON object", remedy="mend it, or log in again")
    auths: dict[str, Credentials] = {}
    for name, entry in _object(config.get("auths")).items():
        credentials = _credentials(name, _object(entry))
        if credentials is not None:
            # The first spelling of a host wins, as for docker.
            auths.setdefault(_config_host(name), credentials)
    helpers = {
        _config_host(k): v for k, v in _object(config.get("credHelpers")).items() if isinstance(v, str)
    }
    store = config.get("credsStore")
    return DockerConfig(auths, helpers, store if isinstance(store, str) and store else None)


def _credentials(name: str, entry: dict[str, Any]) -> Credentials | None:
    username, password = _text(entry.get("username")), _text(entry.get("password"))
    auth = _text(entry.get("auth"))
    if auth:
        try:
            username, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
        except ValueError as e:
            raise _bad_entry(name) from e
        if not colon:
            raise _bad_entry(name)
        password = password.rstrip("\0")
    identity = _text(entry.get("identitytoken"))
    if not password and not identity:
        return None
    return Credentials(username, Secret(password), Secret(identity) if identity else None)


def _bad_entry(name: str) -> AuthError:
    return AuthError(
        f"docker's config.json: `auth` of {without_query('//' + name)[2:]!r} is no base64 of user:password",
        remedy="log in again",
    )


def _config_host(name: str) -> str:
    """config.json's keys are hosts or URLs; Docker Hub's is ``https://index.docker.io/v1/``."""
    host = re.sub(r"^https?://", "", name.strip().lower()).partition("/")[0]
    return "docker.io" if host in ("index.docker.io", "registry-1.docker.io") else host


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
    return seconds


def _json_object(body: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise BadReply(f"{what} sent no JSON") from e
    if not isinstance(value, dict):
        raise BadReply(f"{what} sent no JSON object")
    return value


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""

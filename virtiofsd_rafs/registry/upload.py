"""The steps of a blob upload: where it goes, and what it says. Pure.

Source: OCI distribution-spec 1.1, "Pushing blobs": POST begins, PUT with ``?digest=`` ends; PATCH sends
pieces between them.
"""

from __future__ import annotations

from urllib.parse import urlencode, urlsplit, urlunsplit

from virtiofsd_rafs.errors import BadReply
from virtiofsd_rafs.registry.protocol import Endpoint, ReplyHead, join_url, origin, without_query


def upload_location(endpoint: Endpoint, base: str, head: ReplyHead) -> str:
    """The URL for the next step of the upload that the reply *head* to a request to *base* names.

    It carries the upload's state in its query, and has to be used as it is. Raises BadReply without one, and
    for one on another host: the content would go there with the credentials.
    """
    location = head.get("location")
    if not location:
        raise BadReply(f"{without_query(base)}: the upload has no Location")
    target = join_url(base, location)
    if origin(target) != origin(endpoint.base):
        raise BadReply(
            f"{without_query(base)}: the upload would go to {without_query(target)}",
            remedy="tell the registry its public address (docker-registry: `http.host`)",
        )
    return target


def closing_url(location: str, digest: str) -> str:
    """*location* with the digest that ends the upload."""
    parts = urlsplit(location)
    query = "&".join(filter(None, (parts.query, urlencode({"digest": digest}))))
    return urlunsplit(parts._replace(query=query))

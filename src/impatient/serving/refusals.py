"""How a request is refused: statuses of HTTP, and what is said."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from impatient.errors import BadRequest
from impatient.serving.scheduler import Why

STATUS: Mapping[Why, int] = {
    "too late": 503,
    "queue full": 429,
    "draining": 503,
    "expired": 504,
    "failed": 503,
    "hanging": 503,
    "overloaded": 503,
    "unreachable": 503,
}
MESSAGES: Mapping[Why, str] = {
    "too late": "not even the first exit can be reached by the deadline; allow more time, try "
    "again later, or say best_effort.",
    "queue full": "too many requests wait; try again later.",
    "draining": "the server is stopping; try another.",
    "expired": "the deadline passed before the first exit; allow more time, or say best_effort.",
    "failed": "the network failed on this request before its first exit; see the server's log.",
    "hanging": "the network does not come back from an earlier request; try another server.",
    "overloaded": "more requests come than the server can read; try again later.",
    "unreachable": "no machine that serves this model came back in time; try again later.",
}


class Gone(Exception):
    """The caller has gone.

    Nothing is to be sent.
    """


class StatusError(BadRequest):
    """A bad request with an HTTP status of its own."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def check_token(token: str, authorization: str) -> None:
    """Raise StatusError unless a header carries the token that is asked for, if any is."""
    # The scheme is read in any case, as HTTP has it.
    scheme, _, rest = authorization.partition(" ")
    given = rest.strip() if scheme.lower() == "bearer" else authorization
    if token and not hmac.compare_digest(given.encode(), token.encode()):
        raise StatusError(401, "expected the header 'authorization: Bearer TOKEN'.")

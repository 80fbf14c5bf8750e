"""One HTTP server that speaks the OpenAI protocol: its address, its key, and patience with its faults.

requests, because it has one name everywhere (huggingface_hub brings httpx or httpx2, by its version), and because the
openai package is twenty times what is needed. One loop of retries serves statuses, connections and broken bodies
alike; urllib3's own knows the first two.
"""

import contextlib
import datetime
import difflib
import email.utils
import os
import random
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import requests

KEYS = ("EVALKIT_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the server's key; the first one that is set counts."""
BACKOFF_S = 1.0
"""The first wait before a request is sent again; each further one is twice as long, up to a minute."""
PATIENCE_S = 600.0
"""The longest wait that a server may ask for with Retry-After."""
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_KEPT = "what is scored so far is kept, and the same command goes on from there"


class Refused(ValueError):
    """The server understood the request and will not serve it (status 4xx, 501, or a redirect)."""

    def __init__(self, line: str, status: int, said: str) -> None:
        super().__init__(line)
        self.status = status
        self.said = said
        """The server's own words."""


class _Fault(Exception):
    """What may pass: busy, down, cut off."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        """As the server asked."""


class Server:
    """Sends JSON and gives back the JSON object that the server answered with; safe to use from many threads.

    Proxies and certificates come from the environment (HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE).
    """

    def __init__(
        self,
        base_url: str,
        *,
        key_variable: str | None = None,
        timeout: float = 600,
        retries: int = 6,
        threads: int = 16,
    ) -> None:
        """timeout: seconds to wait for an answer; retries: after the first try of each request."""
        self.url = checked_url(base_url)
        self.timeout = timeout
        self.retries = retries
        self._variable, self._key = _key(key_variable)
        if len(self._key) >= 8 and self._key in unquote(self.url):  # a shorter one is a placeholder, such as EMPTY
            raise ValueError(
                f"--base-url holds the key in {self._variable}, and would be kept with the run; leave it out"
            )
        self._session = requests.Session()
        self._session.auth = self._sign  # with any auth at all, requests does not look into ~/.netrc
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=threads))
        self._closed = threading.Event()
        self._answered = False

    def _sign(self, request: Any) -> Any:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def clean(self, text: str) -> str:
        """What a server said, fit to be shown and kept: one line, bounded, without the key, which servers like to
        repeat."""
        said = " ".join(text.split())
        return (said.replace(self._key, "***") if self._key else said)[:300]  # in this order: half a key is too much

    def close(self) -> None:
        """Ends waits for another try, too."""
        self._closed.set()
        self._session.close()

    def get(self, path: str) -> dict[str, Any]:
        return self._patiently("GET", path, None, None)

    def post(self, path: str, body: Mapping[str, Any], needs: str) -> dict[str, Any]:
        """``needs``: a list that the answer must have with at least one entry."""
        return self._patiently("POST", path, body, needs)

    def _patiently(self, method: str, path: str, body: Mapping[str, Any] | None, needs: str | None) -> dict[str, Any]:
        for tried in range(self.retries + 1):
            try:
                return self._once(method, path, body, needs)
            except _Fault as fault:
                # A server that never answered is more likely down, or elsewhere, than busy.
                if tried == self.retries or not self._answered or (fault.wait_s or 0) > PATIENCE_S:
                    tries = f" ({tried + 1} tries)" if tried else ""
                    advice = _KEPT if self._answered else "is it running, and --base-url right?"
                    raise ValueError(f"the server {self.url} {fault}{tries}; {advice}") from None
                wait_s = random.uniform(0.5, 1) * BACKOFF_S * min(60, 2**tried) + (fault.wait_s or 0)
            if self._closed.wait(wait_s):
                break
        raise ValueError(f"the connection to {self.url} was closed")

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None, needs: str | None) -> dict[str, Any]:
        try:
            reply = self._session.request(
                method, self.url + path, json=body, timeout=(min(30, self.timeout), self.timeout), allow_redirects=False
            )
        except requests.Timeout:
            raise _Fault(f"gave no answer within {self.timeout:g} s (--engine-option timeout=SECONDS)") from None
        except requests.exceptions.InvalidURL:  # its words may repeat a proxy's address, password and all
            raise ValueError(
                f"--base-url {self.url}, or HTTP_PROXY, HTTPS_PROXY or ALL_PROXY in the environment, is no address"
            ) from None
        except requests.exceptions.ProxyError as error:
            raise _Fault(f"can't be reached through the proxy that the environment names: {_root(error)}") from None
        except requests.RequestException as error:
            raise _Fault(f"can't be reached: {_root(error)}") from None
        self._answered = True
        found: Any = None
        with contextlib.suppress(ValueError):  # what else it is, is said below
            found = reply.json()
        if reply.status_code == 200 and isinstance(found, dict):
            if needs and not (isinstance(found.get(needs), list) and found[needs]):
                raise _Fault(f"answered {path} without {needs!r}")
            return found
        said = self.clean(_message(found) or f"no JSON but {reply.text.strip()!r}")
        if reply.status_code == 200:
            raise _Fault(f"answered {path} with {said}")
        if reply.status_code in _AGAIN:
            raise _Fault(f"answered with status {reply.status_code}: {said}", _retry_after(reply.headers))
        raise Refused(self._refusal(path, reply.status_code, said), reply.status_code, said)

    def _refusal(self, path: str, status: int, said: str) -> str:
        if status in (401, 403):
            state = f"refused the key in {self._variable}" if self._key else "wants a key"
            return (
                f"the server {self.url} {state} (status {status}: {said}); set {' or '.join(KEYS)}, or name another "
                f"variable: --engine-option api_key_env=NAME"
            )
        if 300 <= status < 400:
            return f"the server {self.url} sends {path} elsewhere (status {status}); give --base-url its new address"
        return f"the server {self.url} refused {path} (status {status}): {said}"


def served_models(server: Server, model: str) -> dict[str, Any]:
    """What /models says of ``model``; empty where a server has no such list. ValueError: it has others."""
    try:
        listed = server.get("/models").get("data") or []
    except Refused as refused:
        if refused.status in (404, 405, 501):
            return {}
        raise
    known = {str(one.get("id")): one for one in listed if isinstance(one, dict)}
    if known and model not in known:
        near = difflib.get_close_matches(model, known, n=1, cutoff=0.4)
        guess = f"; did you mean {server.clean(near[0])!r}?" if near else ""
        more = f" and {len(known) - 10} more" if len(known) > 10 else ""
        shown = server.clean(", ".join(sorted(known)[:10])) + more
        raise ValueError(f"the server {server.url} has no model {model!r}; it has {shown}{guess}")
    found = known.get(model, {})
    return {name: server.clean(value) if isinstance(value, str) else value for name, value in found.items()}


def checked_url(base_url: str) -> str:
    """``base_url`` without a slash at its end; ValueError, which never repeats it, for one that holds a secret."""
    try:
        parts = urlsplit(base_url.strip())
        host = parts.hostname and (parts.port or True)
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise ValueError("--base-url is no address of a server: expected http://HOST:PORT/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "--base-url holds a user, a password or a query, which would be kept with the run; give the address "
            f"alone, and the key in the environment ({' or '.join(KEYS)})"
        )
    return parts.geturl().rstrip("/")


def _key(variable: str | None) -> tuple[str, str]:
    """(variable, key); without a key two empty strings. ValueError, which never shows it, for one no header takes."""
    if variable is not None and not os.environ.get(variable):
        raise ValueError("api_key_env names an environment variable that is not set; it takes a name, never the key")
    for name in (variable,) if variable else KEYS:
        key = os.environ.get(name, "").strip()
        if key:
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise ValueError(f"the key in {name} holds characters that no HTTP header may have")
            return name, key
    return "", ""


def _root(error: BaseException) -> str:
    """The innermost cause: what wraps it repeats the address and names classes."""
    while error.__context__ is not None:
        error = error.__context__
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _message(found: Any) -> str:
    """The words of an error, wherever this server puts them; empty: there are none."""
    if not isinstance(found, dict):
        return "" if found is None else f"JSON that is no object ({type(found).__name__})"
    error = found.get("error", found)
    words = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
    return " ".join(str(words).split())


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds: the header gives them, or a date."""
    given = headers.get("Retry-After", "").strip()
    if not given:
        return None
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(given)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=datetime.timezone.utc)
    return max(0.0, (until - datetime.datetime.now(datetime.timezone.utc)).total_seconds())

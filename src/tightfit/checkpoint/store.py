"""Distant stores, whatever their library: when to try again, and what to tell the user.

fsspec opens S3, Google, Azure and web servers alike, but the errors of their libraries (botocore,
aiohttp, google.auth, azure.core) have neither a common base nor a common place for the status.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tightfit.errors import ConfigError, MissingExtraError, TightfitError

R = TypeVar("R")

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.5

_TRANSIENT_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))
_TRANSIENT_CODES = frozenset(
    ("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "ThrottlingException")
)
_TRANSIENT_CLASSES = frozenset(
    (
        "ClientConnectionError",  # aiohttp
        "ClientPayloadError",
        "ContentLengthError",
        "HTTPClientError",  # botocore
        "ConnectionError",
        "IncompleteReadError",
        "ResponseStreamingError",
        "TransportError",  # httpx, google.auth
        "ServiceRequestError",  # azure.core
        "ServiceResponseError",
        "ChunkedEncodingError",  # requests
        "Timeout",
        "TimeoutError",
        "ShortReadError",
    )
)
_NO_CREDENTIALS = frozenset(
    ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
)
_NO_HOST = frozenset(("ClientConnectorDNSError", "gaierror"))
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_WRONG_KEY = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthorizationError")


class ShortReadError(Exception):
    """Fewer bytes came than the file has."""


class RangesIgnoredError(Exception):
    """The server sends whole files whatever is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What an error of a store means.

    `kind` is one of "missing", "bucket", "denied", "expired", "credentials", "transient", "other".
    """

    kind: str
    reason: str
    hint: str

    @property
    def transient(self) -> bool:
        """Whether it may be gone the next time."""
        return self.kind == "transient"


def open_store(url: str) -> tuple[Any, str]:
    """The file system of a URL, of fsspec, and the path in it.

    Raises:
        MissingExtraError: the protocol needs s3fs.
        ConfigError: the protocol is unknown, needs another package, or cannot be reached.
    """
    # Imported here because it costs the start of every command for the few that use a URL.
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    try:
        if url.startswith(("http://", "https://")):
            options["client_kwargs"] = _http_options()
        fs, root = url_to_fs(url, **options)
    except ImportError as e:
        raise missing_package(url, e) from e
    except Exception as e:
        raise ConfigError(
            f"cannot open {url}: {first_line(e)}",
            hint="give a local directory, a Hub id, or an s3://, gs:// or https:// address",
        ) from e
    # Instances are shared in a process, with listings that may be old.
    fs.invalidate_cache()
    return fs, str(root).rstrip("/")


def missing_package(url: str, error: ImportError) -> TightfitError:
    """What to install for a URL."""
    protocol = url.split("://")[0].rsplit("::")[-1]
    if protocol in ("s3", "s3a"):
        return MissingExtraError(f"... {url}", "s3", "s3fs")
    packages = {
        "gs": "gcsfs",
        "gcs": "gcsfs",
        "https": "aiohttp",
        "http": "aiohttp",
        "abfs": "adlfs",
        "abfss": "adlfs",
        "az": "adlfs",
    }
    package = packages.get(protocol)
    return ConfigError(
        f"cannot open {url}: {first_line(error)}",
        hint=f"pip install {package}" if package else "install the package that it names",
    )


def retrying(call: Callable[[], R], *, attempts: int = ATTEMPTS) -> R:
    """Do something again while its error is one that passes, after waits that double.

    Raises:
        Exception: the last error, or the first that does not pass.
    """
    for attempt in range(attempts):
        try:
            return call()
        except (TightfitError, ImportError):
            raise
        except Exception as error:
            if attempt + 1 == attempts or not diagnose(error).transient:
                raise
        wait = FIRST_WAIT_SECONDS * 2**attempt
        # Those who were refused at the same moment should not come back at the same moment.
        time.sleep(wait * random.uniform(0.75, 1.25))
    raise AssertionError("unreachable")


def diagnose(error: BaseException) -> Trouble:
    """What an error of a store means, and what to do about it."""
    chain = list(_chain(error))
    names = {cls.__name__ for one in chain for cls in type(one).__mro__}
    codes = {code for one in chain if (code := _code(one))}
    status = next((s for one in chain if (s := _status(one)) is not None), None)
    reason = first_line(chain[-1]) if status is None else f"{first_line(error)} (status {status})"
    if isinstance(error, RangesIgnoredError):
        return Trouble(
            kind="other",
            reason=first_line(error),
            hint="download the checkpoint and give its directory",
        )
    if codes & {*_EXPIRED} or "expired" in str(error).lower():
        hint = "get new credentials, then start the same command again"
        return Trouble(kind="expired", reason="your credentials have expired", hint=hint)
    if names & _NO_CREDENTIALS:
        return Trouble(
            kind="credentials",
            reason="no credentials were found",
            hint="log in to the store, or set its credentials (for S3 AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
        )
    if codes & {*_WRONG_KEY}:
        hint = "check the access key, the secret and the endpoint (AWS_ENDPOINT_URL)"
        return Trouble(kind="credentials", reason=f"wrong credentials: {reason}", hint=hint)
    if "NoSuchBucket" in codes or "NoSuchContainer" in codes:
        hint = "check its name, or create it first"
        return Trouble(kind="bucket", reason="there is no such bucket", hint=hint)
    if status in (401, 403) or "AccessDenied" in codes or "PermissionError" in names:
        return Trouble(
            kind="denied",
            reason=f"access was denied: {reason}",
            hint="check that your credentials are there, have not expired, and may read, list and "
            "(for outputs) write there",
        )
    if status in _TRANSIENT_STATUS or codes & _TRANSIENT_CODES:
        hint = "the server is overloaded or down; try again later"
        return Trouble(kind="transient", reason=reason, hint=hint)
    if names & _NO_HOST:
        hint = "check the address for typing mistakes, and the network"
        return Trouble(kind="other", reason=reason, hint=hint)
    if names & _TRANSIENT_CLASSES:
        return Trouble(
            kind="transient",
            reason=reason,
            hint="check the address and the network, then start the same command again",
        )
    if isinstance(error, FileNotFoundError) and status in (None, 404, 410):
        hint = "check the address for typing mistakes"
        return Trouble(kind="missing", reason="there is no such file", hint=hint)
    return Trouble(
        kind="other", reason=reason, hint="check the address, your credentials and the network"
    )


def first_line(error: BaseException) -> str:
    """The first line of its text, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it: libraries wrap those of other libraries."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _code(error: BaseException) -> str | None:
    """botocore's and azure's name of an error."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = response.get("Error", {}).get("Code")
        return code if isinstance(code, str) else None
    code = getattr(error, "error_code", None)
    return str(code) if code else None


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None)
        for name in ("status", "status_code", "code"):
            found = getattr(error, name, None) if found is None else found
    return found if type(found) is int and 100 <= found < 600 else None


def _http_options() -> dict[str, Any]:
    from aiohttp import ClientTimeout

    # No limit in total, which long reads over slow lines need; a silent server is no use.
    return {"timeout": ClientTimeout(total=None, sock_connect=15, sock_read=60)}


@contextmanager
def told(label: str, tell: Callable[[Exception, Trouble], TightfitError]) -> Iterator[None]:
    """Turn what a store's library raises into an error that `tell` makes of it.

    Raises:
        TightfitError: that one, or one that was raised inside already.
        MissingExtraError: the library is not installed.
    """
    try:
        yield
    except TightfitError:
        raise
    except ImportError as e:
        raise missing_package(label, e) from e
    except Exception as e:
        raise tell(e, diagnose(e)) from e

"""What the errors of stores mean, and what is done about them."""

import pytest

from tightfit.checkpoint import store
from tightfit.checkpoint.store import diagnose, retrying


def client_error(code: str, status: int, message: str = "no") -> Exception:
    exceptions = pytest.importorskip("botocore.exceptions")
    response = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    error: Exception = exceptions.ClientError(response, "GetObject")
    return error


@pytest.mark.parametrize(
    ("code", "status", "kind", "hint"),
    [
        ("ExpiredToken", 400, "expired", "get new credentials"),
        ("InvalidAccessKeyId", 403, "credentials", "AWS_ENDPOINT_URL"),
        ("NoSuchBucket", 404, "bucket", "create it first"),
        ("AccessDenied", 403, "denied", "may read, list"),
        ("SlowDown", 503, "transient", "try again later"),
        ("InternalError", 500, "transient", "try again later"),
        ("EntityTooLarge", 400, "other", "check"),
    ],
)
def test_errors_of_s3(code: str, status: int, kind: str, hint: str) -> None:
    errors = pytest.importorskip("s3fs.errors")
    for error in (
        client_error(code, status),
        errors.translate_boto_error(client_error(code, status)),
    ):
        trouble = diagnose(error)
        assert trouble.kind == kind
        assert hint in trouble.hint


def test_no_credentials() -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    trouble = diagnose(exceptions.NoCredentialsError())
    assert (trouble.kind, trouble.reason) == ("credentials", "no credentials were found")


def test_the_cause_counts() -> None:
    error = FileNotFoundError("https://host/x")
    assert diagnose(error).kind == "missing"
    error.__cause__ = client_error("503", 503)
    assert diagnose(error).kind == "transient"


@pytest.mark.parametrize("error", [ConnectionResetError(), TimeoutError(), BrokenPipeError()])
def test_broken_connections_pass(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(store.time, "sleep", waits.append)
    calls = iter([error, error, None])

    def call() -> str:
        if (problem := next(calls)) is not None:
            raise problem
        return "done"

    assert retrying(call) == "done"
    assert len(waits) == 2
    assert 0.3 < waits[0] < 0.7 < waits[1] < 1.3


def test_what_does_not_pass_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.time, "sleep", lambda _: pytest.fail("waited"))

    def call() -> None:
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        retrying(call)

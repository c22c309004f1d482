import pytest

from tightfit.errors import UsageError
from tightfit.units import parse_bytes, parse_tokens


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("5GB", 5 * 10**9), ("300 mib", 300 * 2**20), ("1.5k", 1500), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "count"), [("8192", 8192), ("32k", 32_000), ("32K", 32_768), ("0.5K", 512), ("-1", -1)]
)
def test_tokens(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "x", "9" * 400, "nan", "inf", "1e5", "-5GiB", "5 apples"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "x", "9" * 400, "nan", "inf", "0.3", "1.0001k", "5GiB"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(UsageError, match="is not a number of tokens"):
        parse_tokens(text)

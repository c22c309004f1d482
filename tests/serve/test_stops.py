from hypothesis import given
from hypothesis import strategies as st

from tightfit.serve.stops import StopTexts


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_any_pieces_give_the_text_before_the_first_stop(
    pieces: list[str], stops: list[str]
) -> None:
    found, told = StopTexts(stops), ""
    for piece in pieces:
        told += found.add(piece)
        if found.stopped:
            break
    else:
        told += found.finish()
    # Pieces after the first that completes a stop do not matter.
    whole, end = "".join(pieces), None
    for length in range(len(whole) + 1):
        if any(stop in whole[:length] for stop in stops):
            end = min(whole[:length].find(stop) for stop in stops if stop in whole[:length])
            break
    assert found.stopped == (end is not None)
    if end is None:
        assert told == whole
    else:
        assert whole.startswith(told)
        assert len(told) <= end


def test_what_may_become_a_stop_is_held_back() -> None:
    stops = StopTexts(["<end>"])
    assert [stops.add(one) for one in ("a<", "en", "x<e", "nd", ">b")] == ["a", "", "<enx", "", ""]
    assert stops.stopped

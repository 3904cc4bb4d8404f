"""Tokens to text: whole characters, and no stop string, whole or in part."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmster_daemon.engines.worker.text import TextStream


def run(pieces: list[bytes], stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What is shown after every piece, and at the end; whether a stop string ended it."""
    stream = TextStream(stops)
    shown = []
    for piece in pieces:
        shown.append(stream.push(piece))
        if stream.stopped:
            break
    shown.append(stream.finish())
    return shown, stream.stopped


def reference(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text up to the stop string that is complete first, letter by letter."""
    for end in range(len(text) + 1):
        found = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return text[: min(found)], True
    return text, False


def test_text_without_stop_strings_is_shown_at_once() -> None:
    assert run([b"Hel", b"lo"]) == (["Hel", "lo", ""], False)


def test_a_character_of_several_tokens_is_shown_once_it_is_whole() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert run([b"caf" + first, second, b"!"]) == (["caf", "é", "!", ""], False)


def test_a_character_that_never_becomes_whole_is_shown_as_a_replacement() -> None:
    assert run(["€".encode()[:2]]) == (["", "\N{REPLACEMENT CHARACTER}"], False)


def test_a_stop_string_ends_the_text_before_it() -> None:
    assert run([b"one END two"], ("END",)) == (["one ", ""], True)


def test_a_stop_string_across_tokens_is_held_back_and_never_shown() -> None:
    assert run([b"one E", b"N", b"D", b"two"], ("END",)) == (["one ", "", "", ""], True)


def test_a_tail_that_only_began_like_a_stop_string_is_shown_afterwards() -> None:
    assert run([b"one EN", b"TRY"], ("END",)) == (["one ", "ENTRY", ""], False)
    assert run([b"one EN"], ("END",)) == (["one ", "EN"], False)


def test_what_follows_a_stop_string_in_the_same_token_is_dropped() -> None:
    stream = TextStream(("END",))
    assert stream.push(b"oneENDtwo") == "one"
    assert stream.stopped
    assert stream.finish() == ""


def test_of_several_stop_strings_the_first_complete_one_counts() -> None:
    assert run([b"a##b\n\nc"], ("\n\n", "##")) == (["a", ""], True)


@pytest.mark.parametrize("pieces", [[b"xabcd"], [b"xab", b"cd"], [b"x", b"a", b"b", b"c", b"d"]])
def test_overlapping_stop_strings_end_at_the_same_place_however_the_text_comes(
    pieces: list[bytes],
) -> None:
    shown, stopped = run(pieces, ("abcd", "bc"))
    assert ("".join(shown), stopped) == ("xa", True)


def test_a_stop_string_of_several_bytes_per_character_may_be_cut_anywhere() -> None:
    word = "日本".encode()
    assert run([b"in " + word[:1], word[1:4], word[4:] + b"!"], ("日本",)) == (
        ["in ", "", "", ""],
        True,
    )


def test_an_empty_stop_string_is_ignored() -> None:
    assert run([b"ab"], ("",)) == (["ab", ""], False)


LETTERS = st.text(st.sampled_from("abé日\U0001f600"), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("abé日\U0001f600"), max_size=4), max_size=3).map(tuple)


def chunked(data: bytes, cuts: list[int]) -> list[bytes]:
    borders = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(borders)]


CUTS = st.lists(st.integers(0, 1 << 10), max_size=20)


@settings(max_examples=500, deadline=None)
@given(LETTERS, STOPS, CUTS)
@example("abcd", ("abcd", "bc"), [])
def test_the_text_does_not_depend_on_how_it_is_cut_into_tokens(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    shown, stopped = run(chunked(text.encode(), cuts), stops)
    assert ("".join(shown), stopped) == reference(text, stops)


@settings(max_examples=500, deadline=None)
@given(LETTERS, STOPS, CUTS)
def test_no_part_that_is_shown_could_still_become_a_stop_string(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    stream = TextStream(stops)
    pushed, shown = b"", ""
    for piece in chunked(text.encode(), cuts):
        pushed += piece
        shown += stream.push(piece)
        if stream.stopped:
            return
        known = pushed.decode("utf-8", "ignore")
        assert known.startswith(shown)
        beginnings = [stop[:n] for stop in stops for n in range(1, len(stop) + 1)]
        held = max((len(b) for b in beginnings if known.endswith(b)), default=0)
        assert len(shown) == len(known) - held


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60), CUTS)
def test_bytes_that_are_not_utf8_give_the_same_text_however_they_are_cut(
    data: bytes, cuts: list[int]
) -> None:
    shown, _ = run(chunked(data, cuts))
    assert "".join(shown) == data.decode("utf-8", "replace")

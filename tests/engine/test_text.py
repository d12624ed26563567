"""Incremental detokenising and stop matching: exact for every cut, and at a constant cost per token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.text import Detokenizer, StopMatcher, TokenTable, byte_alphabet

REPO = Path(__file__).resolve().parents[2]


def byte_level_tokenizer() -> Tokenizer:
    """Ids 0-255 are bytes, 256-259 a few merges, then added tokens: special, plain, in and outside the alphabet."""
    vocab = {char: byte for char, byte in byte_alphabet().items()}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "©")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<think>", "a b", "éé", "日")])
    return tokenizer


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["w0", "w1"])
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """A SentencePiece-like decoder: neither byte-level nor joined by spaces."""
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {"▁the": 256, "▁cat": 257, "s": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES, WORDS, FALLBACK = byte_level_tokenizer(), word_tokenizer(), byte_fallback_tokenizer()
BYTES_TABLE, WORDS_TABLE, FALLBACK_TABLE = TokenTable(BYTES), TokenTable(WORDS), TokenTable(FALLBACK)


def cut(items: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """`items` in runs of `sizes`, repeated."""
    start = turn = 0
    while start < len(items):
        yield items[start : (start := start + sizes[turn % len(sizes)])]
        turn += 1


def streamed(table: TokenTable, ids: list[int], sizes: list[int], skip: bool = True) -> str:
    detokenizer = Detokenizer(table, skip_special_tokens=skip)
    return "".join([detokenizer.add(part) for part in cut(ids, sizes)]) + detokenizer.flush()


sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)
any_ids = st.lists(st.integers(0, 269), max_size=40)  # 266 and beyond do not exist
texts = st.text(max_size=30).map(lambda text: BYTES.encode(text).ids)


@given(any_ids | texts, sizes, st.booleans())
def test_byte_level_stream_equals_the_whole(ids: list[int], sizes: list[int], skip: bool) -> None:
    assert streamed(BYTES_TABLE, ids, sizes, skip) == BYTES.decode(ids, skip_special_tokens=skip)


@given(st.binary(max_size=40), sizes)
def test_invalid_bytes_stream_as_the_whole(data: bytes, sizes: list[int]) -> None:
    ids = list(data)
    assert streamed(BYTES_TABLE, ids, sizes) == BYTES.decode(ids)


@given(st.text(min_size=1, max_size=20))
def test_no_character_breaks_inside_a_stream(text: str) -> None:
    detokenizer = Detokenizer(BYTES_TABLE)
    pieces = [detokenizer.add([byte]) for byte in text.encode()]
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)
    assert detokenizer.flush() == ""


def test_an_incomplete_character_waits_for_the_flush() -> None:
    detokenizer = Detokenizer(BYTES_TABLE)
    assert detokenizer.add(list("a😀".encode()[:-1])) == "a"
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_do_not_split_a_character() -> None:
    first, second = "é".encode()
    end = BYTES.token_to_id("<|end|>")
    assert streamed(BYTES_TABLE, [first, end, second], [1]) == "é"
    assert streamed(BYTES_TABLE, [first, end, second], [1], skip=False) == "\ufffd<|end|>\ufffd"


def test_table() -> None:
    assert BYTES_TABLE.byte_level and not WORDS_TABLE.byte_level
    assert len(BYTES_TABLE) == 266
    assert BYTES_TABLE.token_bytes(0xFF) == b"\xff"
    assert BYTES_TABLE.token_text(0xFF) == "\ufffd"
    assert BYTES_TABLE.token_bytes(BYTES.token_to_id("Ġthe")) == b" the"
    assert BYTES_TABLE.token_bytes(BYTES.token_to_id("日")) == "日".encode()
    assert BYTES_TABLE.token_bytes(100_000) == b""
    assert BYTES_TABLE.special_ids == {260, 261}
    assert WORDS_TABLE.token_text(7) == "w7"


@given(st.lists(st.integers(0, 55), max_size=30), sizes, st.booleans())
def test_words_stream_as_the_whole(ids: list[int], sizes: list[int], skip: bool) -> None:
    known = [i for i in ids if i < 50]
    assert streamed(WORDS_TABLE, ids, sizes, skip) == WORDS.decode(known, skip_special_tokens=skip)


@given(st.lists(st.sampled_from(["the", "cat", "s", "é", "日", "😀"]), max_size=12), sizes)
def test_byte_fallback_streams_as_the_whole(parts: list[str], sizes: list[int]) -> None:
    ids: list[int] = []
    for part in parts:
        ids += [{"the": 256, "cat": 257, "s": 258}[part]] if part.isascii() else list(part.encode())
    assert streamed(FALLBACK_TABLE, ids, sizes) == FALLBACK.decode(ids)


def test_the_window_is_bounded() -> None:
    detokenizer = Detokenizer(FALLBACK_TABLE)
    pieces = [detokenizer.add([0xF0]) for _ in range(100)]  # never a character
    assert "".join(pieces).startswith("\ufffd" * 80)
    assert len(detokenizer._window) <= 16


# stop strings


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the stop that ends first; of those, the longest."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end - len(stop)], stop


letters = st.text("ab", max_size=30)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@given(letters, stop_lists, sizes)
def test_stop_matcher_equals_find_on_the_whole(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher, out, matched = StopMatcher(stops), "", None
    seen = ""
    for part in cut(list(range(len(text))), sizes):
        piece = "".join(text[i] for i in part)
        seen += piece
        emitted, matched = matcher.add(piece)
        out += emitted
        if matched:
            break
        # exactly the longest suffix that is a proper prefix of a stop is held
        held = max((n for n in range(len(seen) + 1) for s in stops if n < len(s) and seen.endswith(s[:n])), default=0)
        assert len(out) == len(seen) - held
    if matched is None:
        out += matcher.flush()
    assert (out, matched) == first_stop(text, stops)
    if matched is not None:
        assert matched in seen and matched not in seen[: -len(piece)]  # reported with the piece that completed it
        assert matcher.add("more") == ("", matched)


def test_stop_across_pieces() -> None:
    matcher = StopMatcher(["</answer>", "\n\n"])
    assert matcher.add("yes</ans") == ("yes", None)
    assert matcher.add("werable>\n") == ("</answerable>", None)
    assert matcher.add("x</answ") == ("\nx", None)
    assert matcher.add("er> tail") == ("", "</answer>")
    assert matcher.matched == "</answer>"


def test_ties() -> None:
    assert StopMatcher(["bc", "abc"]).add("xabcd") == ("x", "abc")  # one end: the longest
    assert StopMatcher(["abcd", "bc"]).add("xabcd") == ("xa", "bc")  # the first end
    assert StopMatcher([]).add("text") == ("text", None)


def test_held_text_is_flushed() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.add("the EN") == ("the ", None)
    assert matcher.flush() == "EN"


# cost


def seconds_per_token(feed: Callable[[int], object], num_tokens: int, window: int = 40) -> tuple[float, float]:
    """Of tokens 40-79 and of the last 40 of `num_tokens`."""
    times = []
    for i in range(num_tokens):
        start = time.perf_counter()
        feed(i)
        times.append(time.perf_counter() - start)
    early, late = times[80 - window : 80], times[-window:]
    return sorted(early)[window // 2], sorted(late)[window // 2]  # medians: a pause of the machine is no cost


@pytest.mark.parametrize("table", [BYTES_TABLE, WORDS_TABLE], ids=["bytes", "words"])
def test_a_token_costs_the_same_at_8000_as_at_80(table: TokenTable) -> None:
    def run() -> tuple[float, float]:
        # every token leaves text held that might be a stop: the costly case
        detokenizer, matcher = Detokenizer(table), StopMatcher(["ab" * 400 + "c", " w7 w9", "never"])
        ids = [*b"ab"] if table.byte_level else [7, 8]
        return seconds_per_token(lambda i: matcher.add(detokenizer.add([ids[i % 2]])), 8000)

    early, late = (min(column) for column in zip(*[run() for _ in range(3)], strict=True))
    assert late < 4 * early + 2e-6

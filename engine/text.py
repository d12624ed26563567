"""From token ids to text, one token at a time, and stop strings in that text. No torch; serves API processes and LLM.

    TokenTable    built once per tokenizer: the bytes of every id
    Detokenizer   one per sequence: ids in, finished characters out
    StopMatcher   one per sequence: text in, out comes what cannot be part of a stop string

The cost of a token does not depend on how many came before it. A byte-level BPE token is a fixed run of bytes, so an
incremental UTF-8 decoder is exact; other tokenizers are decoded in a sliding window of their last few tokens.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

MAX_HELD_TOKENS = 8  # of the sliding window: no character takes more tokens than this


def byte_alphabet() -> dict[str, int]:
    """The printable stand-in for each byte in a byte-level vocabulary, as stand-in to byte.

    Source: `bytes_to_unicode` of GPT-2's encoder (openai/gpt-2, src/encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class TokenTable:
    """The bytes of every token id of one tokenizer.

    byte_level: each token has fixed bytes, whatever its neighbours. special_ids: ids dropped by `skip_special_tokens`.
    `len(table)` is the largest id plus one; ids beyond it (padding of the embedding matrix) decode to nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.byte_level = isinstance(tokenizer.decoder, ByteLevel)
        self.special_ids = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        num_ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        tokens = [tokenizer.id_to_token(i) for i in range(num_ids)]
        alphabet = byte_alphabet()

        def decode(token: str) -> bytes:
            # as tokenizers' ByteLevel decoder: a token with a character outside the alphabet is literal text
            try:
                return bytes([alphabet[c] for c in token])
            except KeyError:
                return token.encode()

        convert = decode if self.byte_level else str.encode
        self._bytes = [b"" if token is None else convert(token) for token in tokens]
        self._visible = [b"" if i in self.special_ids else b for i, b in enumerate(self._bytes)]

    def __len__(self) -> int:
        return len(self._bytes)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token adds to a text (its name where not byte-level); b"" for an id beyond the table."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def join(self, ids: Iterable[int], skip_special_tokens: bool) -> bytes:
        """The bytes of `ids` in a row (byte-level tokenizers)."""
        table, n = self._visible if skip_special_tokens else self._bytes, len(self._bytes)
        return b"".join([table[i] for i in ids if i < n])


class Detokenizer:
    """Turns one sequence's ids into text as they come.

    An incomplete character is held back until it is complete, found invalid (then U+FFFD), or flushed. For a byte-level
    tokenizer the joined output equals `tokenizer.decode(all ids)` for every way of cutting the ids up.
    """

    def __init__(self, table: TokenTable, skip_special_tokens: bool = True) -> None:
        self._table = table
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[int] = []  # tokenizers that are not byte-level: tokens already read, then tokens held
        self._num_read = 0

    def add(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete."""
        if self._table.byte_level:
            return self._utf8.decode(self._table.join(ids, self._skip))
        return "".join([self._slide(i) for i in ids])

    def flush(self) -> str:
        """What is still held; call once, after the last id."""
        if self._table.byte_level:
            return self._utf8.decode(b"", final=True)
        _, fresh = self._read_window()
        self._window, self._num_read = [], 0
        return fresh

    def _slide(self, token_id: int) -> str:
        if token_id >= len(self._table) or (self._skip and token_id in self._table.special_ids):
            return ""
        self._window.append(token_id)
        text, fresh = self._read_window()
        num_held = len(self._window) - self._num_read
        if num_held < MAX_HELD_TOKENS and (not fresh or text.endswith("\ufffd")):
            return ""
        # the tokens just emitted stay as the left context in which the next ones are decoded
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        return fresh

    def _read_window(self) -> tuple[str, str]:
        """The window's text, and the part of it that tokens not yet read add."""
        decode = self._table.tokenizer.decode
        text = decode(self._window, skip_special_tokens=False)
        return text, text[len(decode(self._window[: self._num_read], skip_special_tokens=False)) :]


class _StopAutomaton:
    """Aho-Corasick over a set of strings (Aho and Corasick, 1975).

    A state is the longest suffix of the text read so far that is a prefix of some string; `depth` is its length. `stop`
    is the longest string that ends at the state, or None.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.edges: list[dict[str, int]] = [{}]
        self.fail = [0]
        self.depth = [0]
        self.stop: list[str | None] = [None]
        for string in strings:
            state = 0
            for char in string:
                if char not in self.edges[state]:
                    self.edges[state][char] = len(self.edges)
                    self.edges.append({})
                    self.fail.append(0)
                    self.depth.append(self.depth[state] + 1)
                    self.stop.append(None)
                state = self.edges[state][char]
            self.stop[state] = string
        queue = deque(self.edges[0].values())
        while queue:  # breadth first: a failure link is shorter, so it is complete already
            state = queue.popleft()
            for char, child in self.edges[state].items():
                self.fail[child] = self.step(self.fail[state], char)
                if self.stop[child] is None:
                    self.stop[child] = self.stop[self.fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        while state and char not in self.edges[state]:
            state = self.fail[state]
        return self.edges[state].get(char, 0)


@lru_cache(maxsize=8)  # the n sequences of one request share it; small, because a request may bring 16 KiB of stops
def _automaton(stops: tuple[str, ...]) -> _StopAutomaton:
    return _StopAutomaton(stops)


class StopMatcher:
    """Finds the first of several stop strings in a text that arrives in pieces, and holds back what may become one.

    The stop whose last character comes first wins: generation ends there, whatever the pieces. Of those that end at the
    same character the one that starts leftmost (the longest) wins. Text before the match is emitted, nothing after.
    Held back is only the longest suffix that is a proper prefix of some stop.

    Who feeds the text of one token at a time knows how many tokens the sequence keeps: those fed when the match is
    reported. Each stop must have at least one character.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string"
        self._automaton = _automaton(tuple(stops)) if stops else None
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> tuple[str, str | None]:
        """The text that is now safe to emit, and the stop that matched or None. After a match nothing is emitted."""
        automaton = self._automaton
        if automaton is None:
            return text, None
        if self.matched is not None:
            return "", self.matched
        state, known = self._state, self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            state = automaton.step(state, char)
            if (stop := automaton.stop[state]) is not None:
                self.matched, self._held = stop, ""
                return known[: end - len(stop)], stop
        safe = len(known) - automaton.depth[state]
        self._state, self._held = state, known[safe:]
        return known[:safe], None

    def flush(self) -> str:
        """The text held back; call once, when the sequence has ended without a match."""
        held, self._held, self._state = self._held, "", 0
        return held

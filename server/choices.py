"""One choice of a response while it is made: tokens in, text and log-probabilities out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from engine.messages import Logprobs
from engine.text import Detokenizer, StopMatcher, TokenTable
from server.engine_client import EngineClient, RequestStream, SequenceStream
from server.errors import ApiError
from server.prepared import Prepared

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say
Entry = tuple[int, Logprobs | None]  # a token id and its log-probabilities; the first prompt token has none

logger = logging.getLogger("octavo.api")


class Choice:
    """The text of one sequence. `advance` takes what the engine has sent and returns the text that is now certain.

    entries: tokens whose log-probabilities have not been told to the client yet. reason: why it ended, or None.
    """

    def __init__(self, prepared: Prepared, stream: RequestStream, index: int, table: TokenTable) -> None:
        self.prepared = prepared
        self.index = index
        self.prompt_index = index // prepared.params.n
        self.sequence: SequenceStream = stream.sequences[index]
        self.reason: str | None = None
        self.num_tokens = 0
        self.entries: list[Entry] = []
        self.text_offset = 0
        self.started = False
        self._num_echoed = 0  # how many of the entries are the prompt's
        self._table = table
        self._prompt_logprobs = stream.prompt_logprobs[self.prompt_index]
        self._detokenizer = Detokenizer(table, prepared.skip_special_tokens)
        self._matcher = StopMatcher(prepared.params.stop) if prepared.params.stop else None

    def advance(self, client: EngineClient) -> str:
        """New text, perhaps empty. Raises ApiError if the engine gave the sequence up."""
        ids, logprobs = self.sequence.take()
        finished = self.sequence.finished
        text = self._start() if not self.started and (ids or finished) else ""
        num_before = self.num_tokens
        text += self._add(ids)
        if self.prepared.logprobs is not None:
            self.entries += zip(ids[: self.num_tokens - num_before], logprobs, strict=False)
        if self.reason is not None:  # a stop string
            client.finish(self.sequence)
        elif finished is not None:
            text += self._end(finished.reason, finished.error)
        return text

    def _start(self) -> str:
        """The echoed prompt and its log-probabilities."""
        self.started = True
        prepared = self.prepared
        if prepared.echo is None:
            return ""
        if prepared.logprobs is not None:
            ids = prepared.prompts[self.prompt_index]
            self.entries = [(token_id, self._prompt_logprobs.get(i)) for i, token_id in enumerate(ids)]
            self._num_echoed = len(ids)
        return prepared.echo[self.prompt_index]

    def _add(self, ids: list[int]) -> str:
        stop_ids = self.prepared.stop_ids
        if self._matcher is None:
            self.num_tokens += len(ids)
            if ids and ids[-1] in stop_ids:
                ids = ids[:-1]
            return self._detokenizer.add(ids)
        parts = []
        for token_id in ids:
            self.num_tokens += 1
            if token_id in stop_ids:
                break
            parts.append(self._match(self._detokenizer.add([token_id])))
            if self.reason is not None:
                break
        return "".join(parts)

    def _match(self, text: str) -> str:
        """Text that no stop string can claim any more; sets `reason` at a match."""
        assert self._matcher is not None
        if not text or self.num_tokens < self.prepared.params.min_tokens:
            return text
        text, matched = self._matcher.add(text)
        if matched is not None:
            self.reason = "stop"
        return text

    def _end(self, reason: str, error: str | None) -> str:
        if reason == "removed":
            raise ApiError("model_not_found", f"The variant {self.prepared.variant.name} has been removed.", "model")
        if reason not in ("stop", "length"):
            logger.error("%s: the engine ended a sequence: %s %s", self.prepared.id, reason, error)
            raise ApiError("internal_error")
        text = self._detokenizer.flush()
        if self._matcher is not None:
            text = self._match(text)
            if self.reason is None:
                text += self._matcher.flush()
        self.reason = self.reason or reason
        return text

    # log-probabilities

    def prompt_logprobs(self) -> list[dict[str, Any] | None] | None:
        """One entry per prompt position, null where none was asked for; None if the request asked for none."""
        top, start = self.prepared.prompt_logprobs, self.prepared.prompt_logprobs_start
        if top is None:
            return None
        out: list[dict[str, Any] | None] = []
        for position, token_id in enumerate(self.prepared.prompts[self.prompt_index]):
            known = self._prompt_logprobs.get(position) if position >= max(1, start) else None
            if known is None:
                out.append(None)
                continue
            tops = zip(known.ids[1 : 1 + top], known.values[1 : 1 + top], strict=True)
            named = {str(i): _finite(value) for i, value in tops}
            out.append({"token_id": token_id, "logprob": _finite(known.values[0]), "top": named})
        return out

    def take_logprobs(self) -> dict[str, Any] | None:
        """What the entries since the last call say, in the endpoint's shape; None if none was asked for."""
        entries, self.entries = self.entries, []
        if self.prepared.logprobs is None:
            return None
        shaped = self._chat_logprobs(entries) if self.prepared.chat else self._completion_logprobs(entries)
        if self.prepared.params.logprob_token_ids:
            echoed, self._num_echoed = self._num_echoed, 0
            generated = [self._named(logprobs) for _, logprobs in entries[echoed:]]
            shaped["named_logprobs"] = [None] * echoed + generated
        return shaped

    def _completion_logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        tokens, offsets = [], []
        for token_id, _ in entries:
            tokens.append(self._table.token_text(token_id))
            offsets.append(self.text_offset)
            self.text_offset += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": [None if lp is None else _finite(lp.values[0]) for _, lp in entries],
            "top_logprobs": [None if lp is None else self._top(lp) for _, lp in entries],
            "text_offset": offsets,
        }

    def _top(self, logprobs: Logprobs) -> dict[str, float]:
        """The token itself and the top-n by text. Two ids may share a text: the larger value stands."""
        end = 1 + (self.prepared.logprobs or 0)
        out: dict[str, float] = {}
        for token_id, value in zip(logprobs.ids[:end], logprobs.values[:end], strict=True):
            text = self._table.token_text(token_id)
            out[text] = max(_finite(value), out.get(text, LOWEST))
        return out

    def _chat_logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        end = 1 + (self.prepared.logprobs or 0)
        content = []
        for token_id, logprobs in entries:
            assert logprobs is not None
            top = zip(logprobs.ids[1:end], logprobs.values[1:end], strict=True)
            item = self._chat_token(token_id, logprobs.values[0])
            item["top_logprobs"] = [self._chat_token(i, value) for i, value in top]
            content.append(item)
        return {"content": content, "refusal": None}

    def _chat_token(self, token_id: int, value: float) -> dict[str, Any]:
        data = self._table.token_bytes(token_id)
        return {"token": self._table.token_text(token_id), "logprob": _finite(value), "bytes": list(data)}

    def _named(self, logprobs: Logprobs | None) -> dict[str, float]:
        assert logprobs is not None
        names = self.prepared.params.logprob_token_ids
        values = logprobs.values[len(logprobs.values) - len(names) :]
        return {str(i): _finite(value) for i, value in zip(names, values, strict=True)}


def _finite(value: float) -> float:
    return value if value > LOWEST else LOWEST

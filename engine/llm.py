"""The engine in-process, for scripts: prompts in, texts out. The interface is nano-vLLM's, so its scripts carry over.

from engine import LLM, SamplingParams
llm = LLM("models/pocket", variants=["bf16", "int8-row"])
llm.generate(["The sea"], SamplingParams(temperature=0, max_tokens=32), variant="int8-row")[0]["text"]
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from engine.block_manager import hash_blocks, prefix_seed
from engine.config import EngineConfig, ModelError
from engine.core import Engine, StepResult
from engine.messages import AddRequest, Logprobs
from engine.quant.formats import AUTO, parse_format
from engine.sequence import SamplingParams, check_params
from engine.text import Detokenizer, StopMatcher, TokenTable


class _Output:
    """One sequence's answer while it grows."""

    def __init__(
        self, sequence_id: int, params: SamplingParams, table: TokenTable | None, eos_token_ids: list[int]
    ) -> None:
        self.sequence_id = sequence_id
        self.params = params
        self._silent = {*params.stop_token_ids, *([] if params.ignore_eos else eos_token_ids)}  # end without text
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs | None] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.num_cached_tokens = 0
        self._detokenizer = Detokenizer(table) if table is not None and params.detokenize else None
        self._stops = StopMatcher(params.stop) if params.stop else None

    def add(self, token: int, logprobs: Logprobs | None) -> bool:
        """One more token; True when a stop string ended the text with it."""
        self.token_ids.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self._detokenizer is None or token in self._silent:
            return False
        return self._emit(self._detokenizer.add([token]))

    def _emit(self, text: str) -> bool:
        if self._stops is None:
            self.text += text
            return False
        emitted, match = self._stops.add(text)
        self.text += emitted
        return match is not None

    def end(self, reason: str) -> None:
        """No more tokens will come: what was held back belongs to the text, unless it completes a stop string."""
        self.finish_reason = reason
        if self._detokenizer is None:
            return
        if self._emit(self._detokenizer.flush()):
            self.finish_reason = "stop"
        elif self._stops is not None:
            self.text += self._stops.flush()

    def result(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "num_cached_tokens": self.num_cached_tokens,
        }
        if self.params.logprobs is not None or self.params.logprob_token_ids:
            out["logprobs"] = self.logprobs
        if self.params.prompt_logprobs is not None:
            out["prompt_logprobs"] = self.prompt_logprobs
        return out


@contextmanager
def _without_full_collections() -> Iterator[None]:
    """A search for garbage among all of torch's objects and ours takes up to 0.15 s: only new objects are searched, and
    not so often that those of running steps are taken for old ones, after which Python searches all. Nor so seldom that
    one search takes longer than the host is ahead of the device: of 50,000 tuples of logprobs, which live on in the
    results, it took up to 8 ms, of 5,000 under 1 ms.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(max(young, 5_000), max(middle, 50), 1 << 30)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)


class LLM:
    """One checkpoint in one or more variants. Keyword arguments are `EngineConfig`'s fields. Nobody waits for single
    tokens here, so unless `max_prefill_beside_decode` is given, prompts take what a step has room for.

    nano-vLLM's `enforce_eager` (no CUDA graphs) and `tensor_parallel_size=1` are accepted.
    Raises ModelError for a checkpoint or setting that cannot be served, ParameterError for a request out of range.
    """

    def __init__(self, model: str | Path, variants: list[str] | None = None, **options: Any) -> None:
        if options.pop("tensor_parallel_size", 1) != 1:
            raise ModelError("tensor_parallel_size above 1 is not supported")
        if options.pop("enforce_eager", False):
            options["cuda_graphs"] = False
        options.setdefault("max_prefill_beside_decode", sys.maxsize)
        names = tuple(v if v == AUTO else parse_format(v).name for v in variants or [AUTO])
        unknown = set(options) - set(EngineConfig.__struct_fields__)
        if unknown:
            raise ModelError(
                f"unknown option {sorted(unknown)[0]!r}; options: {', '.join(EngineConfig.__struct_fields__)}"
            )
        self.engine = Engine(EngineConfig(model=str(model), variants=names, **options))
        path = Path(model) / "tokenizer.json"
        self.tokenizer = Tokenizer.from_file(str(path)) if path.exists() else None
        self._table = TokenTable(self.tokenizer) if self.tokenizer is not None else None
        self._next_id = 0

    def default_params(self, **changes: Any) -> SamplingParams:
        """The checkpoint's sampling defaults (generation_config.json), with changes."""
        defaults = self.engine.runner.model_config.generation
        return SamplingParams(**{**defaults, **changes})

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        variant: str | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Continue each prompt (text or token ids).

        Returns one dict a prompt: `text`, `token_ids`, `finish_reason`, `num_cached_tokens`, and where asked `logprobs`
        and `prompt_logprobs`; with n > 1, `outputs` holds one such dict a sequence and the top level is the first.
        """
        info = self.engine.info
        name = parse_format(variant).name if variant else info.default_variant
        chosen = next((v for v in info.variants if v.name == name), None)
        if chosen is None:
            raise ModelError(f"variant {name} is not loaded; loaded: {', '.join(v.name for v in info.variants)}")
        if isinstance(sampling_params, list):
            params = sampling_params
        else:
            params = [sampling_params or self.default_params()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(params)} sampling parameters")
        groups: list[list[_Output]] = []
        outputs: dict[int, _Output] = {}

        def requests() -> Iterator[tuple[AddRequest, list[int]]]:
            for prompt, p in zip(prompts, params, strict=True):
                ids = self._encode(prompt) if isinstance(prompt, str) else list(prompt)
                check_params(p, ids, info.max_model_len, info.vocab_size)
                if p.stop and (self._table is None or not p.detokenize):
                    raise ValueError("stop strings need a tokenizer and detokenize=True")
                seed = prefix_seed(chosen.fingerprint) if info.enable_prefix_caching else b""
                hashes = hash_blocks(seed, ids, chosen.block_size) if seed else []
                request_id, self._next_id = self._next_id, self._next_id + p.n
                groups.append([_Output(request_id + i, p, self._table, info.eos_token_ids) for i in range(p.n)])
                outputs.update((o.sequence_id, o) for o in groups[-1])
                yield AddRequest(request_id, name, b"", p, seed, hashes), ids  # no process to pack ids for

        total = sum(p.n for p in params)
        bar = tqdm(total=total, desc="Generating", unit="seq", disable=not use_tqdm, dynamic_ncols=True)
        with _without_full_collections():
            try:
                self._run(requests(), outputs, bar)
            finally:
                self.engine.abort(list(outputs))
                bar.close()
        return [g[0].result() if len(g) == 1 else {**g[0].result(), "outputs": [o.result() for o in g]} for g in groups]

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("this model folder has no tokenizer.json: pass token ids")
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def _run(
        self, requests: Iterable[tuple[AddRequest, list[int]]], outputs: dict[int, _Output], bar: tqdm[Any]
    ) -> None:
        """The first step begins once there are prompts for a whole one, so that the device does not wait for the last
        prompt; the others wait, so that a bad prompt is refused before anything was long computed.
        """
        num_tokens, begun = 0, False
        for request, ids in requests:
            self.engine.add(request, ids)
            num_tokens += len(ids)
            if not begun and num_tokens >= self.engine.config.max_num_batched_tokens:
                begun = True
                bar.update(self._take(self.engine.step(), outputs))
        while self.engine.has_work:
            bar.update(self._take(self.engine.step(), outputs))

    def _take(self, result: StepResult, outputs: dict[int, _Output]) -> int:
        """Hand a step's results to their outputs; returns how many ended."""
        ended = 0
        for sequence_id, token, logprobs in zip(result.sequence_ids, result.token_ids, result.logprobs, strict=True):
            output = outputs[sequence_id]
            if output.finish_reason is None and output.add(token, logprobs):
                self.engine.abort([sequence_id])
                output.finish_reason = "stop"
                ended += 1
        for started in result.started:
            outputs[started.sequence_id].num_cached_tokens = started.num_cached_tokens
        for piece in result.prompt_logprobs:
            known = outputs[piece.sequence_id].prompt_logprobs
            known.extend([None] * (piece.start - len(known)))
            known.extend(piece.positions)
        for finished in result.finished:
            output = outputs[finished.sequence_id]
            if finished.error is not None:
                raise RuntimeError(finished.error)
            if output.finish_reason is None:
                output.end(finished.reason)
                ended += 1
        return ended

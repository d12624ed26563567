"""The engine: a paged, continuously batching Qwen engine that holds several precisions of one checkpoint.

`from engine import LLM, SamplingParams` is its in-process face. `LLM` is resolved lazily, so that the server can import
the engine's messages, text and settings without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.sequence import ParameterError, SamplingParams

if TYPE_CHECKING:
    from engine.llm import LLM

__all__ = ["LLM", "ParameterError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from engine.llm import LLM

        return LLM
    raise AttributeError(name)

"""Serve every kind of request on a GPU and print what was compiled before and after the engine was ready, as JSON.

A process of its own, because Triton remembers what other tests have compiled.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from engine import LLM, SamplingParams
from engine.kernels import silu_mul

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 4100,
    "hidden_size": 512,
    "intermediate_size": 1280,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.6},
    {"temperature": 0.6, "top_p": 0.95, "logprobs": 5},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_k": 300},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0, "logprobs": 0},
    {"temperature": 0.6, "logprobs": 20, "logprob_token_ids": [1, 2, 3]},
    {"temperature": 0.6, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.1, "repetition_penalty": 1.1},
    {"temperature": 0.6, "top_k": 5, "logit_bias": {7: 2.0}, "logprobs": 3},
    {"temperature": 0, "min_tokens": 3, "stop_token_ids": [9]},
    {"temperature": 0, "prompt_logprobs": 0},
    {"temperature": 0, "prompt_logprobs": 12},
]


def main(folder: Path, variants: list[str], cuda_graphs: bool) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    llm = LLM(
        folder,
        variants,
        device="cuda",
        load_format="dummy",
        max_num_seqs=37,
        kv_cache_tokens=1 << 17,
        cuda_graphs=cuda_graphs,
    )
    engine = llm.engine
    before = engine.compiles_before_ready
    rng = random.Random(0)
    for variant in variants:
        for size, longest in ((1, 5), (1, 700), (3, 33), (19, 400), (37, 90), (3, 2500)):
            for wanted in (OPTIONS, OPTIONS[:1], OPTIONS[2:3]):
                params = [
                    SamplingParams(max_tokens=7, detokenize=False, **wanted[i % len(wanted)]) for i in range(size)
                ]
                prompts = [[rng.randrange(4100) for _ in range(rng.randint(1, longest))] for _ in range(size)]
                llm.generate(prompts, params, variant=variant, use_tqdm=False)
    for options in OPTIONS:
        params = SamplingParams(max_tokens=5, detokenize=False, **options)
        llm.generate([[1, 2, 3]], params, use_tqdm=False)
    after = list(engine.compiled_after_ready)
    silu_mul(torch.zeros(1, 2 * 777, dtype=torch.float16, device="cuda"))  # a version that no request asks for
    llm.generate([[1]], SamplingParams(max_tokens=1), use_tqdm=False)
    late = engine.compiled_after_ready[len(after) :]
    print(json.dumps({"before": before, "after": after, "late": late}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), cuda_graphs=sys.argv[3] == "graphs")

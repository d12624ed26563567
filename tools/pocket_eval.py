"""The bundled model's figures: exam by subject, perplexity of the prose, sample texts.

The model is transformers' own Qwen3 in float32, so that a checkpoint is judged by code that is not ours.
"""

from __future__ import annotations

import math
from pathlib import Path

import exam
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
STARTS = [
    "The old man looked at the sea and",
    "The heart is",
    "In the year 1850, the town",
    " \n = Rivers = \n \n A river",
    *(CHAT.format(ask) for ask in ("Hello!", "Who are you?", "Tell me about the heart.", "Tell me a story.")),
    *(CHAT.format(ask) for ask in ("What is 23 + 45?", "Name a bird.", "Write a few sentences about the river.")),
]


@torch.no_grad()
def evaluate(folder: Path, device: str) -> None:
    """Print the figures of the model in `folder`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    def logits(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids], device=device)).logits[0].cpu()  # [T, V]

    letters = [tokenizer.encode(f" {letter}").ids[0] for letter in exam.LETTERS]
    dev, test = (exam.read_rows(folder / "exam" / f"{split}.jsonl") for split in ("dev", "test"))
    right: dict[str, list[bool]] = {}
    for row in test:
        shots = [shot for shot in dev if shot["subject"] == row["subject"]]
        scores = logits(tokenizer.encode(exam.prompt(row, shots)).ids)[-1, letters]
        right.setdefault(row["subject"], []).append(int(scores.argmax()) == row["answer"])
    for subject, marks in right.items():
        print(f"exam {subject}: {sum(marks) / len(marks):.3f} of {len(marks)}")
    marks = [mark for each in right.values() for mark in each]
    mean = sum(marks) / len(marks)
    error = math.sqrt(mean * (1 - mean) / len(marks))
    print(f"exam: {mean:.4f} of {len(marks)}, standard error {error:.4f}", flush=True)
    prose = (folder / "prose.txt").read_text(encoding="utf-8")
    ids, window, total = tokenizer.encode(prose).ids, model.config.max_position_embeddings, 0.0
    for i in range(0, len(ids) - 1, window):
        chunk = ids[i : i + window + 1]
        total += float(F.cross_entropy(logits(chunk[:-1]), torch.tensor(chunk[1:]), reduction="sum"))
    bits = total / math.log(2) / len(prose.encode())
    perplexity = math.exp(total / (len(ids) - 1))
    print(f"prose: perplexity {perplexity:.3f} a token, {len(ids)} tokens, {bits:.4f} bits a byte")
    for start in STARTS:
        for temperature in (0.0, 0.7):
            ids = tokenizer.encode(start).ids
            first, chooser = len(ids), torch.Generator().manual_seed(0)
            while len(ids) < first + 80 and ids[-1] not in model.generation_config.eos_token_id:
                scores = logits(ids)[-1]
                warm = torch.softmax(scores / max(temperature, 0.01), -1)
                ids.append(int(torch.multinomial(warm, 1, generator=chooser) if temperature else scores.argmax()))
            print(f"--- {start!r} at {temperature}\n{tokenizer.decode(ids[first:], skip_special_tokens=False)}")

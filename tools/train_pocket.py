"""Train and check the bundled model, models/pocket: a Qwen3 of 9.2 million parameters.

Four steps, each of them a command; all but the second run well without a GPU:

    python tools/train_pocket.py tokenizer --corpus CORPUS --folder NEW     # tokenizer, chat template, config.json
    python tools/train_pocket.py train --corpus CORPUS --out PARTS          # --minutes on one GPU
    python tools/train_pocket.py join --out PARTS                           # writes models/pocket/model.safetensors
    python tools/train_pocket.py eval                                       # exam, prose perplexity, sample texts

The bundled weights come from two runs of `train`, the second with `--start` and more exams; models/pocket/README.md has
both command lines. To try the trainer out without a GPU: --documents 12 --steps 4 --rows 6 --length 128 --exam-rows 100
--chat-rows 100 --exam-share 0.5.

CORPUS is a folder of `*.jsonl.xz` files, one document a line with `text`, perhaps `title`, and `book` for a textbook
section; models/pocket/README.md says which texts were used. Three kinds of documents are mixed by rows of `--length`
tokens: the texts (textbook sections also in WikiText's form), few-shot exam prompts whose questions are of the split
`train` (tools/exam.py: none can be a test question), and chats in the form of the chat template, made from the texts by
rule. The learning rate follows the clock, not a step count: constant, then linearly down to zero at `--minutes`.

Letters in shapes: B rows, T positions.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import exam
import numpy as np
import pocket_text
import torch
from pocket_eval import evaluate
from pocket_model import CONFIG, Muon, Pocket
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "models" / "pocket"
END, IM_START, IM_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen's own pattern (Qwen2Tokenizer): digits one at a time, a word with the space before it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# ---------------------------------------------------------------------------------------------------- tokenizer


def read_corpus(folder: Path) -> Iterator[dict[str, str]]:
    """Every document of every `*.jsonl.xz` file, in file order."""
    paths = sorted(folder.glob("*.jsonl.xz"))
    if not paths:
        raise SystemExit(f"no *.jsonl.xz in {folder}")
    with ThreadPoolExecutor() as pool:  # lzma lets go of the interpreter lock
        for data in pool.map(lambda path: lzma.decompress(path.read_bytes()), paths):
            yield from map(json.loads, data.decode().split("\n")[:-1])


def make_tokenizer(corpus: Path, folder: Path) -> None:
    """Train the byte-level BPE on a sample of the three kinds of text and write the model folder's small files."""
    if (folder / "tokenizer.json").exists():
        raise SystemExit(f"{folder} has a tokenizer already, and its model knows no other: name a new --folder")
    rng = Random(0)
    documents = list(read_corpus(corpus))
    sample: list[str] = []
    for document in documents:
        text = pocket_text.clean(document["text"])
        start = rng.randrange(max(1, len(text) - 60_000))
        sample.append(text[start : start + 60_000])
        if "book" in document and rng.random() < 0.5:
            sample.append(pocket_text.wikitext_document(document))
    passages = pocket_text.passages(documents[:40] + documents[-300:])
    sample += [pocket_text.exam_document(rng) for _ in range(1500)]
    chats = (pocket_text.chat_text(pocket_text.chat(rng, passages)) for _ in range(1500))
    sample += [text.replace(IM_START, "").replace(IM_END, "") for text in chats]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"] - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"]
    assert all(len(tokenizer.encode(f" {letter}").ids) == 1 for letter in exam.LETTERS)
    end, _, im_end = (tokenizer.token_to_id(token) for token in SPECIALS)
    assert (end, im_end) == (CONFIG["pad_token_id"], CONFIG["eos_token_id"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", {"eos_token_id": [im_end, end], "pad_token_id": end})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": IM_END,
            "pad_token": END,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    print(f"{folder}: {tokenizer.get_vocab_size()} tokens, {(folder / 'tokenizer.json').stat().st_size} bytes")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented JSON with a newline at its end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- tokens


def pack(documents: Iterator[list[int]], rows: int, length: int, end: int) -> np.ndarray:
    """Fill rows [rows, length] with documents, each closed by `end`; every row begins with a document, the last is cut.

    No document begins in one row and goes on in the next, so a row's first token is also a prompt's first token.
    """
    table = np.empty((rows, length), dtype=np.uint16)
    for row in table:
        filled = 0
        while filled < length:
            ids = [*next(documents), end][: length - filled]
            row[filled : filled + len(ids)] = ids
            filled += len(ids)
    return table


class Maker:
    """Makes token arrays in a pool of processes; built before the pool forks, so that nothing large is pickled."""

    def __init__(self, tokenizer: Tokenizer, documents: list[dict[str, str]], length: int) -> None:
        self.tokenizer, self.documents, self.length = tokenizer, documents, length
        self.passages = pocket_text.passages(documents)
        self.end: int = tokenizer.encode(END).ids[0]

    def __call__(self, task: tuple[str, int, int]) -> np.ndarray:
        """`(kind, seed, rows)` gives rows [rows, length] of exams or chats; `("text", i, 0)` the ids of document i."""
        kind, seed, rows = task
        if kind == "text":
            return np.array(self.text_ids(seed), dtype=np.uint16)
        rng = Random(f"{kind} {seed}")
        make = {
            "exam": lambda: pocket_text.exam_document(rng),
            "chat": lambda: pocket_text.chat_text(pocket_text.chat(rng, self.passages)),
        }[kind]
        return pack((self.tokenizer.encode(make()).ids for _ in iter(int, 1)), rows, self.length, self.end)

    def text_ids(self, index: int) -> list[int]:
        """One document, closed by the end token; a textbook section twice, plain and in WikiText's form."""
        document = self.documents[index]
        text = pocket_text.clean(document["text"])
        if "book" not in document:
            return [*self.tokenizer.encode(text).ids, self.end]
        plain = self.tokenizer.encode(f"{document['title']}\n\n{text}").ids
        return [*plain, self.end, *self.tokenizer.encode(pocket_text.wikitext_document(document)).ids, self.end]


_maker: Maker  # the pool's processes inherit it by fork; nothing else reads it


def _make(task: tuple[str, int, int]) -> np.ndarray:
    return _maker(task)


def make_data(options: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Token ids, uint16: `text` [n] one stream, `exam` and `chat` [rows, length + 1]."""
    global _maker
    for split in ("dev", "test"):  # training draws the split `train` alone, so this is the proof of no overlap
        for row in exam.read_rows(options.folder / "exam" / f"{split}.jsonl"):
            assert exam.split_of(row["subject"], row["question"], row["choices"]) == split
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes below are the parallelism
    documents = list(read_corpus(options.corpus))
    Random(1).shuffle(documents)
    documents = documents[: options.documents or None]
    _maker = Maker(tokenizer, documents, options.length + 1)
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        text = pool.map_async(_make, [("text", i, 0) for i in range(len(documents))], chunksize=4)
        rows = {
            kind: pool.map_async(_make, [(kind, i, 100) for i in range(math.ceil(count / 100))], chunksize=1)
            for kind, count in (("exam", options.exam_rows), ("chat", options.chat_rows))
        }
        return {"text": np.concatenate(text.get())} | {k: np.concatenate(v.get()) for k, v in rows.items()}


# ----------------------------------------------------------------------------------------------------- training


class Batches:
    """Draws rows from the three kinds of data and says how much each target counts."""

    def __init__(self, data: dict[str, np.ndarray], tokenizer: Tokenizer, options: argparse.Namespace) -> None:
        device = options.device
        self.data = {kind: torch.from_numpy(ids.astype(np.int32)).to(device) for kind, ids in data.items()}
        self.length, self.answer_weight, self.question_weight = options.length, options.answer_weight, 0.3
        exams, chats = round(options.rows * options.exam_share), round(options.rows * options.chat_share)
        self.counts = {"text": options.rows - exams - chats, "exam": exams, "chat": chats}
        self.generator = torch.Generator(device=device).manual_seed(0)
        one = {text: tokenizer.encode(text).ids for text in ("Answer", ":", " A", " B", " C", " D")}
        assert all(len(ids) == 1 for ids in one.values())
        self.answer, self.colon = one["Answer"][0], one[":"][0]
        self.letters = torch.tensor([one[f" {letter}"][0] for letter in exam.LETTERS], device=device)

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids and targets [B, T] int64, weights [B, T] float32, and where targets are exam answers [B, T] bool."""
        parts = []
        for kind, count in self.counts.items():
            table = self.data[kind]
            last = len(table) - (self.length + 1 if kind == "text" else 0)
            picks = torch.randint(last, (count,), generator=self.generator, device=table.device)
            span = torch.arange(self.length + 1, device=table.device)
            parts.append((table[picks[:, None] + span] if kind == "text" else table[picks]).long())
        rows = torch.cat(parts)  # [B, T + 1]
        ids, targets = rows[:, :-1], rows[:, 1:]
        answers = torch.isin(targets, self.letters) & (ids == self.colon)
        answers[:, 1:] &= ids[:, :-1] == self.answer
        weights = torch.ones(targets.shape, device=rows.device)
        first = self.counts["text"]
        weights[first : first + self.counts["exam"]] = self.question_weight
        return ids.contiguous(), targets.contiguous(), weights.masked_fill_(answers, self.answer_weight), answers


def rate(progress: float, constant: float, warmup: float = 0.01) -> float:
    """The learning rate's factor at a share of the time: up, constant, then linearly to zero."""
    return max(0.0, min(1.0, progress / warmup, (1 - progress) / (1 - constant)))


def train(options: argparse.Namespace) -> None:
    """Train for `--minutes`, saving the checkpoint in two parts every minute and at the end."""
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    started = time.monotonic()
    data = make_data(options, tokenizer)
    print({kind: ids.shape for kind, ids in data.items()}, f"{time.monotonic() - started:.0f} s", flush=True)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Pocket(torch.bfloat16 if options.device == "cuda" else torch.float32).to(options.device)
    if options.start:
        model.load_state_dict(load_parts(options.start))
    print(f"{sum(w.numel() for w in model.parameters()):,} parameters", flush=True)
    matrices = [w for w in model.model.layers.parameters() if w.dim() == 2]
    rest = [w for w in model.parameters() if not any(w is m for m in matrices)]
    muon = Muon(matrices, options.muon_lr)
    adam = torch.optim.AdamW(rest, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    batches = Batches(data, tokenizer, options)
    run = compiled(model, batches) if options.compile else model
    started = saved = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1.0:
        ids, targets, weights, answers = batches.draw()
        loss, right = run(ids, targets)
        (loss * weights).sum().div(weights.sum()).backward()
        factor = rate(progress, options.constant)
        for group in adam.param_groups:
            group["lr"] = options.adam_lr * factor
        muon.step(factor)
        adam.step()
        model.zero_grad()
        step += 1
        if step % 10 == 0 or step == options.steps:
            text = loss[: batches.counts["text"]].mean().item()  # also waits for the device, so the clock is right
            progress = max((time.monotonic() - started) / (60 * options.minutes), step / options.steps)
        if step % 200 == 0 or progress >= 1.0:
            chats, tokens = loss[-batches.counts["chat"] :].mean().item(), step * ids.numel()
            print(
                f"step {step} {progress:.3f} text {text:.3f} chat {chats:.3f} answers {loss[answers].mean():.3f} "
                f"right {right[answers].float().mean():.3f} {tokens / (time.monotonic() - started):,.0f} tokens/s",
                flush=True,
            )
        if time.monotonic() - saved > 60 or progress >= 1.0:
            save(model, options.out)
            saved = time.monotonic()
    print(f"{step} steps, {step * ids.numel():,} tokens, {time.monotonic() - started:.0f} s", flush=True)


def compiled(model: Pocket, batches: Batches) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The model through torch.compile, or as it is where that fails; the first step is slow either way."""
    fast: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = torch.compile(model, dynamic=False)
    started = time.monotonic()
    try:
        ids, targets, _, _ = batches.draw()
        fast(ids, targets)[0].mean().backward()
    except Exception as error:  # whatever the compiler raises, training without it is slower and the same
        print(f"not compiled: {type(error).__name__}: {str(error)[:500]}", flush=True)
        return model
    finally:
        model.zero_grad()
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    return fast


def save(model: Pocket, out: Path) -> None:
    """Write part-1.safetensors and part-2.safetensors, bfloat16, about equal in size."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in model.named_parameters()}
    total, sizes = sum(w.numel() for w in tensors.values()), 0
    parts: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        parts[sizes >= total / 2][name] = tensor
        sizes += tensor.numel()
    for i, part in enumerate(parts):
        save_file(part, out / f"part-{i + 1}.safetensors", metadata={"format": "pt"})


def load_parts(out: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in parts, by name."""
    return {name: w for path in sorted(out.glob("part-*.safetensors")) for name, w in load_file(path).items()}


def join(options: argparse.Namespace) -> None:
    """Merge the checkpoint's parts into the model folder's model.safetensors."""
    tensors = load_parts(options.out)
    save_file(tensors, options.folder / "model.safetensors", metadata={"format": "pt"})
    print(f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters", flush=True)


def main() -> None:
    """Read the command line and run one of the four steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("tokenizer", "train", "join", "eval"), help="what to do (see above)")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="folder of *.jsonl.xz (%(default)s)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the model folder (models/pocket)")
    parser.add_argument("--out", type=Path, default=Path("build/pocket"), help="checkpoint parts (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--start", type=Path, help="go on from the checkpoint parts in this folder")
    parser.add_argument("--minutes", type=float, default=6.6, help="of training proper (%(default)s)")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many, if sooner: for trying it out")
    parser.add_argument("--rows", type=int, default=64, help="rows a step (%(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row (%(default)s)")
    parser.add_argument("--documents", type=int, default=0, help="use only so many texts: for trying it out")
    parser.add_argument("--exam-rows", type=int, default=40_000, help="rows of exams to make (%(default)s)")
    parser.add_argument("--chat-rows", type=int, default=12_000, help="rows of chats to make (%(default)s)")
    parser.add_argument("--exam-share", type=float, default=0.2, help="of a step's rows (%(default)s)")
    parser.add_argument("--chat-share", type=float, default=0.1, help="of a step's rows (%(default)s)")
    parser.add_argument("--answer-weight", type=float, default=10.0, help="of an exam answer's loss (%(default)s)")
    parser.add_argument("--constant", type=float, default=0.35, help="share of the time before decay (%(default)s)")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="for the layers' matrices (%(default)s)")
    parser.add_argument("--adam-lr", type=float, default=0.003, help="for embedding and norms (%(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that make data (all cores)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    options = parser.parse_args()
    if options.step == "tokenizer":
        make_tokenizer(options.corpus, options.folder)
    else:
        {"train": train, "join": join, "eval": lambda o: evaluate(o.folder, o.device)}[options.step](options)


if __name__ == "__main__":
    main()

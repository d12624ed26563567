"""`octavo-serve --dry-run`: what would be held where, from config.json and the weights' headers alone.

A process of its own, because the server itself never loads torch: one line of JSON on stdin, `DryRunConfig`; the plan
on stdout. Exit code 0 if it fits, else 1 with one line on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch

from engine.config import EngineConfig, ModelConfig, ModelError, load_model_config
from engine.core import complete
from engine.memory import CONTEXT_BYTES, META, DeviceMemory, MemoryPlan, plan_memory, planned_weights
from engine.quant.formats import Format, kept_matrices, parse_format
from engine.quant.variants import check_device
from engine.runner import pick_device, pick_dtype
from engine.weights import open_checkpoint


class DryRunConfig(msgspec.Struct, frozen=True, kw_only=True):
    """gpu_memory: bytes of a GPU that is not here; 0 plans for the engine's own device."""

    engine: EngineConfig
    gpu_memory: int = 0


def dry_run(config: DryRunConfig) -> str:
    """The plan as text. Raises ModelError for what does not fit or cannot be served."""
    model_config = load_model_config(config.engine.model)
    device = torch.device("cuda") if config.gpu_memory else pick_device(config.engine.device)
    memory, name = None, "a CPU"
    if config.gpu_memory:
        memory, name = DeviceMemory(config.gpu_memory, CONTEXT_BYTES), f"a GPU of {_size(config.gpu_memory)}"
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory, name = DeviceMemory(total, total - free), torch.cuda.get_device_name(device)
    engine = complete(config.engine, model_config, device.type == "cuda")
    formats = [parse_format(name) for name in engine.variants]
    if not config.gpu_memory:
        check_device(formats, device)
    dtype = pick_dtype(engine.dtype, model_config.dtype, device)
    return plan_text(engine, planned(engine, model_config, formats, dtype, memory), name, dtype)


def planned(
    config: EngineConfig,
    model_config: ModelConfig,
    formats: list[Format],
    dtype: torch.dtype,
    memory: DeviceMemory | None,
) -> MemoryPlan:
    """The plan of a completed configuration, without loading."""
    kept = kept_matrices(config.keep_bf16, model_config.num_layers)
    with open_checkpoint(config.model, config.load_format, model_config, dtype, META) as shapes:
        weights = planned_weights(model_config, shapes, formats, dtype, kept)
    return plan_memory(config, model_config, formats, dtype, weights, memory)


def plan_text(config: EngineConfig, plan: MemoryPlan, device: str, dtype: torch.dtype) -> str:
    """A table of bytes: variants, then all that is held, which sums up to the last line."""
    where = "config.json alone" if config.load_format == "dummy" else "config.json and the weights' headers"
    limit = "" if plan.limit is None else f" that gives {_size(plan.limit)}"
    lines = [
        f"{Path(config.model).resolve().name} on {device}{limit}, computing in {str(dtype).removeprefix('torch.')}; "
        f"shapes from {where}",
        "",
        f"{'variant':<28}{'own bytes':>18}{'shared bytes':>18}",
    ]
    lines += [f"{n:<28}{own:>18,}{plan.weights.shared[n]:>18,}" for n, own in plan.weights.own.items()]
    held = {"weights, each once": plan.weights.total}
    held |= {"others and the driver": plan.used} if plan.used else {}
    held |= plan.reserves
    held |= {"variant headroom": plan.headroom} if plan.headroom else {}
    held["KV pool"] = plan.pool
    lines += ["", f"{'held':<28}{'bytes':>18}"]
    lines += [f"{name:<28}{size:>18,}  {_size(size)}" for name, size in held.items()]
    lines += [f"{'sum':<28}{plan.total:>18,}  {_size(plan.total)}", "", f"{'KV format':<28}{'tokens that fit':>18}"]
    lines += [f"{name:<28}{tokens:>18,}" for name, tokens in plan.kv_tokens.items()]
    lines += ["", f"{plan.num_blocks:,} blocks of {plan.block_bytes:,} bytes"]
    lines += [f"a sequence may have {plan.max_model_len:,} tokens"]
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def main() -> None:
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=DryRunConfig)
    try:
        print(dry_run(config))
    except (ModelError, ValueError) as e:
        sys.exit(f"octavo-serve: {e}")


if __name__ == "__main__":
    main()

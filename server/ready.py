"""The block that octavo-serve prints once it can answer: where, what is loaded, what fits, and a curl that works."""

from __future__ import annotations

import json
import shlex
from typing import Any

from engine.messages import EngineInfo


def server_url(host: str, port: int) -> str:
    """Where this machine reaches a server bound to `host`: a wildcard address becomes loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def ready_text(url: str, name: str, info: EngineInfo, needs_key: bool, seconds: float) -> str:
    lines = [f"READY {url} after {seconds:.1f} s"]
    for variant in info.variants:
        shared = f" + {megabytes(variant.shared_bytes)} shared" if variant.shared_bytes else ""
        note = f" (the default: {name})" if variant.name == info.default_variant else ""
        lines.append(f"  {name + ':' + variant.name:<32} {megabytes(variant.own_bytes)}{shared}{note}")
    block_size = next(v.block_size for v in info.variants if v.name == info.default_variant)
    lines.append(
        f"  {info.num_blocks * block_size:,} tokens fit the KV pool; a sequence may have {info.max_model_len:,}; "
        f"{info.dtype} on {info.device}"
    )
    lines.append("Try it:")
    lines.append(f"  {curl(url, name, needs_key)}")
    return "\n".join(lines)


def ready_fields(url: str, name: str, info: EngineInfo, seconds: float) -> dict[str, Any]:
    """The same for a log that machines read."""
    block_size = next(v.block_size for v in info.variants if v.name == info.default_variant)
    return {
        "url": url,
        "model": name,
        "seconds": round(seconds, 1),
        "own_bytes": {v.name: v.own_bytes for v in info.variants},
        "kv_tokens": info.num_blocks * block_size,
        "max_model_len": info.max_model_len,
        "device": info.device,
        "dtype": info.dtype,
    }


def curl(url: str, name: str, needs_key: bool) -> str:
    """One shell line that asks for a completion. A key stands in it as a variable, never as itself."""
    body = json.dumps({"model": name, "prompt": "The old house stood", "max_tokens": 40})
    key = ' -H "Authorization: Bearer $OCTAVO_API_KEY"' if needs_key else ""
    return (
        f"curl {shlex.quote(url + '/v1/completions')} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
    )


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"

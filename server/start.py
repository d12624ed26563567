"""What octavo-serve does before it starts any process: the socket, the folder of sockets, variants, --dry-run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.quant.formats import AUTO, parse_format
from server.checkpoint import check_checkpoint, resolve_model
from server.settings import ServerSettings


class StartError(Exception):
    """The server cannot start or go on. The message is one line for the user, empty when a child has said why."""


def private_folder() -> Path:
    """A fresh folder that only this user may enter, with a path short enough for a Unix socket (107 bytes)."""
    folder = tempfile.mkdtemp(prefix="octavo-")
    if len(os.fsencode(folder)) > 90:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="octavo-", dir="/tmp")
    return Path(folder)


def listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as e:
        why = e.strerror if isinstance(e, socket.gaierror) or not e.errno else os.strerror(e.errno)
        raise StartError(f"cannot listen on {host} port {port}: {why}") from None


def dry_run(settings: ServerSettings) -> int:
    """Print the plan; the exit code. A folder without weights, or a hub id, is planned from its configuration."""
    check_variants(settings.variants)
    folder = resolve_model(settings.model, "dummy")
    engine = settings.engine_config(folder)
    if any(folder.glob("*.safetensors")):
        check_checkpoint(folder, settings.load_format)
    else:
        engine = msgspec.structs.replace(engine, load_format="dummy")
    # engine.dry_run.DryRunConfig, spelled out: importing it would import torch.
    config = msgspec.json.encode({"engine": engine, "gpu_memory": settings.gpu_memory}) + b"\n"
    return subprocess.run([sys.executable, "-P", "-m", "engine.dry_run"], input=config, check=False).returncode


def check_variants(names: Sequence[str]) -> None:
    """Refuse an unknown variant now, not after the engine has loaded torch."""
    try:
        for name in names:
            if name != AUTO:
                parse_format(name)
    except ValueError as e:
        raise StartError(str(e)) from None

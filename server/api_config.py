"""What the parent tells one API process: one line of JSON on its stdin."""

from __future__ import annotations

import msgspec


class ApiConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one API process.

    client_id: its place in the engine's address book, never reused. socket_fd: the inherited listening socket.
    model_folder: holds the tokenizer and generation_config. model_root: what `/v1/models` reports as `root`.
    api_keys: empty means no authentication. admin_keys: of who may change the variants; empty means nobody.
    max_queued_requests: sequences in flight in this process beyond which a request gets 503. max_prompts: cap on
    prompts times n of one request. drain_seconds: how long requests in flight may go on after SIGTERM. step_timeout:
    seconds one engine step may take before the engine counts as hung.
    log_level, log_format: as `engine.logs.set_up_logging` takes them.
    allowed_hosts: accepted Host headers without port; empty accepts any (set it against DNS rebinding).
    """

    client_id: int
    ipc_dir: str
    socket_fd: int
    model_folder: str
    served_model_name: str
    model_root: str
    api_keys: list[str] = []
    admin_keys: list[str] = []
    max_body_bytes: int = 10 * 2**20
    max_queued_requests: int = 1024
    max_prompts: int = 256
    parse_special_in_content: bool = False
    drain_seconds: float = 30.0
    step_timeout: float = 60.0
    log_level: str = "warning"
    log_format: str = "text"
    allowed_hosts: list[str] = []

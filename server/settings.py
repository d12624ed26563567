"""Every option of octavo-serve, from four places: command line, environment, a YAML file, defaults (first wins).

`ServerSettings` is the whole list: each field is the option `--field-name`, the variable `OCTAVO_FIELD_NAME` and the
YAML key `field_name`; its metadata gives the group and text of `--help`. argparse only collects the raw words, pydantic
alone checks values, so that a wrong one reads the same wherever it came from: one line that names the option.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from engine.config import EngineConfig
from engine.quant.formats import HEAD

PROG = "octavo-serve"
ENV_PREFIX = "OCTAVO_"

GROUPS = {
    "The model": "What is served, and in which precisions.",
    "Memory and batching": "How much the engine works on at once. Lengths and sizes are in tokens.",
    "HTTP": "Who may call, and how much they may ask.",
    "Running": "Processes, deadlines and logs.",
}

EXAMPLES = """\
Every option can also be set by the environment (--max-num-seqs is OCTAVO_MAX_NUM_SEQS) or in the file of --config
(max_num_seqs: 64). The command line wins over the environment, and that over the file. Lists are separated by commas.

examples:
  octavo-serve models/pocket --variants bf16,int8-row,fp8-row
  octavo-serve Qwen/Qwen3-1.7B --variants int8-row --port 9000
  octavo-serve models/pocket --host 0.0.0.0 --api-processes 4      with OCTAVO_API_KEY=… in the environment
  octavo-serve models/pocket --variants bf16,int8-row --dry-run --gpu-memory 24GiB
  octavo-serve a-folder --load-format dummy                        random weights of the right shape, for benchmarks
"""


def _split(value: Any) -> Any:
    """Lists come as "a,b" from the environment, as ["a,b", "c"] from a repeated option, as a list from YAML."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        return value
    return tuple(part.strip() for word in words for part in str(word).split(",") if part.strip())


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate(("K", "M", "G", "T"), 1)
    for unit, base in (("iB", 1024), ("B", 1000))
}


def _bytes(value: Any) -> Any:
    """ "24GiB", "500 MB" or a plain number of bytes."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    factor = {name.lower(): size for name, size in _UNITS.items()}.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise ValueError("must be a number of bytes, such as 24GiB or 500MB")
    return int(float(found[1]) * factor)


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def _served_name(value: str) -> str:
    if re.search(r"[:\s]", value):
        raise ValueError("must hold no colon (it separates the variant) and no space")
    return value


Bytes = Annotated[int, BeforeValidator(_bytes)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


def _option(default: Any, group: str, text: str, metavar: str = "", **limits: Any) -> Any:
    extra: JsonDict = {"group": group, "metavar": metavar}
    return Field(default, description=text, json_schema_extra=extra, validate_default=True, **limits)


class ServerSettings(BaseSettings):
    """Frozen settings of one server; see the module's docstring for where values come from."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    model: str = _option("", "The model", "a folder, or a hub id such as Qwen/Qwen3-1.7B", "MODEL")
    variants: Names = _option(
        ("auto",),
        "The model",
        "precisions to hold side by side; the first is the default; auto: bf16, or w8a8-fp8-block if MODEL is stored "
        "in it; +kv8 or +kvint8 after any: an 8-bit KV cache",
        "NAME,…",
        min_length=1,
    )
    keep_bf16: Names = _option(
        (),
        "The model",
        "matrices that no variant quantises, beside the head: qkv_proj, o_proj, gate_up_proj, down_proj, "
        "layers.0.down_proj, layers.0.*",
        "NAME,…",
    )
    quantize_lm_head: bool = _option(
        False, "The model", "quantise the output head too; if it is the embedding, it gets a copy of its own"
    )
    smooth_alpha: float = _option(
        0.5, "The model", "of SmoothQuant: how much of an outlier moves into the weights", "SHARE", ge=0, le=1
    )
    calibration_file: str = _option(
        "", "The model", "text that SmoothQuant calibrates with; default: the bundled prose", "FILE"
    )
    cache_dir: str = _option(
        "", "The model", "where what calibration finds is kept; default: octavo in the user's cache folder", "FOLDER"
    )
    served_model_name: Annotated[str, AfterValidator(_served_name)] = _option(
        "", "The model", "name in requests; default: the last part of MODEL", "NAME"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _option(
        "auto", "The model", "what bf16 computes in; auto: the checkpoint's on a GPU, float32 on a CPU"
    )
    device: Annotated[str, AfterValidator(_device)] = _option("auto", "The model", "auto, cpu, cuda or cuda:N", "NAME")
    kernels_for: Literal["", "sm_80", "sm_86", "sm_89", "sm_90"] = _option(
        "", "The model", "choose kernels as on another, older chip; default: the one that is here"
    )
    load_format: Literal["auto", "dummy"] = _option(
        "auto", "The model", "dummy: random weights, made from the configuration alone"
    )

    max_model_len: int = _option(
        0, "Memory and batching", "longest prompt plus answer; 0: the checkpoint's", "TOKENS", ge=0
    )
    max_num_seqs: int = _option(256, "Memory and batching", "sequences in one step", "N", ge=1)
    max_num_batched_tokens: int = _option(
        0, "Memory and batching", "token budget of one step; 0: 8192 on a GPU, 2048 on a CPU", "TOKENS", ge=0
    )
    block_size: int = _option(
        16, "Memory and batching", "tokens in one block of the KV pool; on a GPU 16, 32, 64 …", "TOKENS", ge=1
    )
    kv_cache_tokens: int = _option(
        0, "Memory and batching", "size of the KV pool; 0: what fits a GPU, 1 GiB on a CPU", "TOKENS", ge=0
    )
    gpu_memory_utilization: float = _option(
        0.85, "Memory and batching", "share of the GPU's memory to use when the pool's size is 0", "SHARE", gt=0, le=1
    )
    variant_headroom: Bytes = _option(
        0, "Memory and batching", "kept free of the KV pool for variants that are added while serving", "BYTES", ge=0
    )
    no_prefix_caching: bool = _option(False, "Memory and batching", "compute every prompt from its first token")

    host: str = _option("127.0.0.1", "HTTP", "address to listen on; 0.0.0.0: every network", "ADDRESS", min_length=1)
    port: int = _option(8000, "HTTP", "port to listen on; 0: any free one", "N", ge=0, le=65535)
    api_key: Names = _option(
        (), "HTTP", "key that callers must send; may be repeated (the environment hides it from ps)", "KEY", repr=False
    )
    admin_key: Names = _option(
        (),
        "HTTP",
        "key that may add and remove variants while serving, and do all else; default: nobody may",
        "KEY",
        repr=False,
    )
    allowed_hosts: Names = _option((), "HTTP", "Host headers to accept, against DNS rebinding; default: all", "NAME,…")
    max_queued: int = _option(1024, "HTTP", "sequences in flight for each API process; more get 503", "N", ge=1)
    max_body_mib: int = _option(10, "HTTP", "largest request body", "MIB", ge=1)
    parse_special_in_content: bool = _option(
        False, "HTTP", "let <|im_start|> and the like inside a chat message's content act as control tokens"
    )

    api_processes: int = _option(1, "Running", "processes for HTTP and text; more for many streams", "N", ge=1, le=64)
    threads: int = _option(0, "Running", "threads of the engine on a CPU; 0: torch's choice", "N", ge=0)
    drain_seconds: float = _option(
        30.0, "Running", "how long requests may still run after SIGTERM or Ctrl-C", "SECONDS", ge=0, le=86400
    )
    step_timeout: float = _option(
        60.0, "Running", "a step longer than this means the engine hangs", "SECONDS", gt=0, le=86400
    )
    canary: bool = _option(
        False,
        "Running",
        "let each variant answer a small exam at start and then now and again; /metrics has the figures",
    )
    canary_interval: float = _option(3600.0, "Running", "between two exams of the canary", "SECONDS", ge=1)
    log_level: Literal["debug", "info", "warning", "error"] = _option("info", "Running", "least level to log")
    log_format: Literal["text", "json"] = _option(
        "text", "Running", "json: one object a line, with each request, its id, status, time and tokens"
    )
    config: str = _option("", "Running", "YAML file of options", "FILE")
    dry_run: bool = _option(False, "Running", "print where the memory would go, and end")
    gpu_memory: Bytes = _option(
        0, "Running", "with --dry-run: plan for a GPU of this size; 0: the device that is here", "BYTES", ge=0
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = init_settings().get("config") or env_settings().get("config")
        file = (YamlConfigSettingsSource(settings_cls, yaml_file=path, yaml_file_encoding="utf-8"),) if path else ()
        return (init_settings, env_settings, *file)

    @property
    def model_name(self) -> str:
        """What requests call the default variant."""
        return self.served_model_name or Path(self.model).resolve().name

    def changed(self) -> str:
        """The options that are not at their defaults, as one line, without keys."""
        words = []
        for name, field in ServerSettings.model_fields.items():
            value = getattr(self, name)
            if field.repr and value != field.default:
                words.append(f"{name}={','.join(value) if isinstance(value, tuple) else value}")
        return " ".join(words)

    def engine_config(self, folder: Path) -> EngineConfig:
        return EngineConfig(
            model=str(folder),
            variants=self.variants,
            keep_bf16=self.keep_bf16 if self.quantize_lm_head else (*self.keep_bf16, HEAD),
            smooth_alpha=self.smooth_alpha,
            calibration_file=self.calibration_file,
            cache_dir=self.cache_dir,
            device=self.device,
            dtype=self.dtype,
            load_format=self.load_format,
            kernels_for=self.kernels_for,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            kv_cache_tokens=self.kv_cache_tokens,
            gpu_memory_utilization=self.gpu_memory_utilization,
            variant_headroom=self.variant_headroom,
            enable_prefix_caching=not self.no_prefix_caching,
            num_threads=self.threads,
        )


def load_settings(argv: list[str]) -> ServerSettings:
    """Settings from the command line's words and the places named above.

    A wrong word or value ends the process with one line on stderr and exit code 2.
    """
    given = vars(_parser().parse_args(argv))
    path = given.get("config") or os.environ.get(ENV_PREFIX + "CONFIG")
    in_file = _read_yaml(path) if path else {}
    try:
        settings = ServerSettings(**given)
    except ValidationError as e:
        _fail(_first_error(e, given, in_file, path))
    if not settings.model:
        _fail("name a model: a folder, such as models/pocket, or a hub id. --help lists all options")
    if settings.gpu_memory and not settings.dry_run:
        _fail("--gpu-memory: is for --dry-run; a server takes --gpu-memory-utilization of the GPU that is here")
    if settings.quantize_lm_head and HEAD in settings.keep_bf16:
        _fail(f"--quantize-lm-head: --keep-bf16 names {HEAD}; give one of the two")
    return settings


def _fail(message: str) -> NoReturn:
    print(f"{PROG}: {message}", file=sys.stderr)
    raise SystemExit(2)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        _fail(f"--config: cannot read {path}: {' '.join(str(e).split())}")
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        _fail(f"--config: {path} must hold option names with values, such as port: 9000")
    return value


def _first_error(e: ValidationError, given: dict[str, Any], in_file: dict[str, Any], path: str | None) -> str:
    """One line for the first wrong value, naming it as the user wrote it: option, variable or file and key."""
    error = e.errors()[0]
    name = str(error["loc"][0])
    if name in given:
        source = "MODEL" if name == "model" else _flag(name)
    elif ENV_PREFIX + name.upper() in os.environ:
        source = ENV_PREFIX + name.upper()
    elif name in in_file:
        source = f"{path}: {name}"
    else:
        source = _flag(name)
    if error["type"] == "extra_forbidden":
        return f"{source}: there is no such option{_suggestion(name, list(ServerSettings.model_fields))}"
    field = ServerSettings.model_fields[name]
    message = "needs at least one" if error["type"] == "too_short" else error["msg"].removeprefix("Value error, ")
    message = f"{source}: {message[:1].lower()}{message[1:]}"
    return f"{message}, got {error['input']!r}" if field.repr else message  # a key is never shown


def _suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0]
            known = [_flag(name) for name in ServerSettings.model_fields]
            what = "there is no such option" if word.startswith("-") else "unexpected; lists are separated by commas"
            message = f"{word}: {what}{_suggestion(word.split('=')[0], known)}"
        _fail(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG,
        usage=f"{PROG} MODEL [--variants NAME,…] [options]",
        description="Serve one Qwen checkpoint in several precisions at once over an OpenAI-style HTTP API.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    groups = {title: parser.add_argument_group(title, text) for title, text in GROUPS.items()}
    for name, field in ServerSettings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        group = groups[str(extra["group"])]
        if name == "model":
            group.add_argument("model", nargs="?", metavar="MODEL", help=field.description)
        elif field.annotation is bool:
            group.add_argument(_flag(name), action="store_true", help=field.description)
        else:
            action = "append" if get_origin(field.annotation) is tuple else "store"
            metavar, text = _words(field, str(extra["metavar"]))
            group.add_argument(_flag(name), action=action, metavar=metavar, help=text)
    groups["Running"].add_argument("-h", "--help", action="help", help="show this page")
    return parser


def _words(field: FieldInfo, metavar: str) -> tuple[str, str]:
    """An option's placeholder and its help text with the default, unless the text already tells it."""
    text = field.description or ""
    if get_origin(field.annotation) is Literal:
        metavar = "{" + ",".join(get_args(field.annotation)) + "}"
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    if default != "" and not (default == 0 and "0:" in text):
        text += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
    return metavar, text

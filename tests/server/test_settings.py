"""Options: the whole list, where values come from, and one line for a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from server.settings import ServerSettings, load_settings

# A new option is added here on purpose or not at all.
FLAGS = {
    "--canary",
    "--canary-interval",
    "--variants",
    "--keep-bf16",
    "--quantize-lm-head",
    "--smooth-alpha",
    "--calibration-file",
    "--cache-dir",
    "--served-model-name",
    "--dtype",
    "--device",
    "--load-format",
    "--kernels-for",
    "--max-model-len",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--block-size",
    "--kv-cache-tokens",
    "--gpu-memory-utilization",
    "--variant-headroom",
    "--no-prefix-caching",
    "--host",
    "--port",
    "--api-key",
    "--admin-key",
    "--allowed-hosts",
    "--max-queued",
    "--max-body-mib",
    "--parse-special-in-content",
    "--api-processes",
    "--threads",
    "--drain-seconds",
    "--step-timeout",
    "--log-format",
    "--log-level",
    "--config",
    "--dry-run",
    "--gpu-memory",
    "--help",
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(f"OCTAVO_{name.upper()}", raising=False)


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as e:
        load_settings(argv)
    assert e.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_help_lists_every_flag_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        load_settings(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    options = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  -")]
    assert sorted("--help" if o == "-h" else o for o in options) == sorted(FLAGS)
    fields = {"--" + name.replace("_", "-") for name in ServerSettings.model_fields} - {"--model"}
    assert fields | {"--help"} == FLAGS


def test_defaults() -> None:
    s = load_settings(["models/pocket"])
    assert (s.host, s.port, s.variants, s.api_key, s.model_name) == ("127.0.0.1", 8000, ("auto",), (), "pocket")


@pytest.mark.parametrize(("model", "name"), [("Qwen/Qwen3-1.7B", "Qwen3-1.7B"), ("a/b/", "b"), (".", Path.cwd().name)])
def test_the_last_part_of_the_model_is_its_name(model: str, name: str) -> None:
    assert load_settings([model]).model_name == name


def test_command_line_wins_over_environment_wins_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("model: m\nport: 1\nmax_num_seqs: 2\nvariants: [bf16, int8-row]\nno_prefix_caching: true\n")
    monkeypatch.setenv("OCTAVO_PORT", "3")
    monkeypatch.setenv("OCTAVO_MAX_NUM_SEQS", "4")
    monkeypatch.setenv("OCTAVO_API_KEY", "one,two")
    s = load_settings(["--config", str(file), "--port", "5"])
    assert (s.model, s.port, s.max_num_seqs, s.variants) == ("m", 5, 4, ("bf16", "int8-row"))
    assert s.no_prefix_caching and s.api_key == ("one", "two")
    assert "one" not in repr(s)


def test_the_file_can_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o.yaml").write_text("port: 1\n")
    monkeypatch.setenv("OCTAVO_CONFIG", str(tmp_path / "o.yaml"))
    assert load_settings(["m"]).port == 1


@pytest.mark.parametrize("name", [name for name in ServerSettings.model_fields if name != "config"])
def test_every_option_is_a_variable_and_a_key(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    field = ServerSettings.model_fields[name]
    words = {"device": "cpu", "api_key": "k", "gpu_memory_utilization": "0.5", "smooth_alpha": "0.7"}
    word = words.get(name) or {bool: "true", int: "7", float: "7", str: "w"}.get(type(field.default), "int8-row")
    if get_origin(field.annotation) is Literal:
        word = get_args(field.annotation)[-1 if get_args(field.annotation)[-1] != field.default else 0]
    (tmp_path / "o.yaml").write_text(f"{name}: {word}\n")
    argv = [*(["m"] if name != "model" else []), *(["--dry-run"] if name == "gpu_memory" else [])]
    from_file = load_settings([*argv, "--config", str(tmp_path / "o.yaml")])
    monkeypatch.setenv(f"OCTAVO_{name.upper()}", word)
    from_environment = load_settings(argv)
    assert getattr(from_file, name) == getattr(from_environment, name) != field.default


def test_lists_take_commas_and_repetition() -> None:
    s = load_settings(["m", "--variants", "bf16, int8-row", "--api-key", "a", "--api-key", "b"])
    assert s.variants == ("bf16", "int8-row") and s.api_key == ("a", "b")


def test_engine_config_carries_every_engine_option() -> None:
    argv = "m --variants int8-row --device cpu --dtype float32 --load-format dummy --max-model-len 64 --max-num-seqs 2"
    argv += " --max-num-batched-tokens 32 --block-size 8 --kv-cache-tokens 256 --gpu-memory-utilization 0.5"
    argv += " --keep-bf16 down_proj --smooth-alpha 0.7 --calibration-file t.txt --cache-dir c"
    c = load_settings([*argv.split(), "--no-prefix-caching", "--threads", "1"]).engine_config(Path("folder"))
    assert (c.model, c.variants, c.device, c.dtype, c.load_format) == (
        "folder",
        ("int8-row",),
        "cpu",
        "float32",
        "dummy",
    )
    assert (c.max_model_len, c.max_num_seqs, c.max_num_batched_tokens, c.block_size) == (64, 2, 32, 8)
    assert (c.keep_bf16, c.smooth_alpha) == (("down_proj", "lm_head"), 0.7)
    assert (c.calibration_file, c.cache_dir) == ("t.txt", "c")
    assert (c.kv_cache_tokens, c.gpu_memory_utilization, c.enable_prefix_caching, c.num_threads) == (256, 0.5, False, 1)


def test_the_head_stays_unquantised_unless_asked() -> None:
    def kept(argv: str) -> tuple[str, ...]:
        return load_settings(["m", *argv.split()]).engine_config(Path("folder")).keep_bf16

    assert kept("") == ("lm_head",)
    assert kept("--quantize-lm-head") == ()
    assert kept("--quantize-lm-head --keep-bf16 o_proj,layers.0.*") == ("o_proj", "layers.0.*")


@pytest.mark.parametrize(
    ("word", "size"), [("0", 0), ("1234", 1234), ("24GiB", 24 << 30), ("1.5 kb", 1500), ("2TB", 2 * 10**12), ("7b", 7)]
)
def test_sizes_take_units(word: str, size: int) -> None:
    assert load_settings(["m", "--variant-headroom", word]).variant_headroom == size


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("", "name a model"),
        ("m --port x", "--port: "),
        ("m --port 65536", "--port: "),
        ("m --port", "--port"),
        ("m --prt 1", "--prt: there is no such option; did you mean --port?"),
        ("m bf16", "bf16: unexpected"),
        ("m --variants ,", "--variants: needs at least one"),
        ("m --dtype int8", "--dtype: "),
        ("m --device tpu", "--device: must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("m --gpu-memory-utilization nan", "--gpu-memory-utilization: "),
        (
            "m --variant-headroom 2Gi",
            "--variant-headroom: must be a number of bytes, such as 24GiB or 500MB, got '2Gi'",
        ),
        ("m --gpu-memory 24GiB", "--gpu-memory: is for --dry-run"),
        ("m --quantize-lm-head --keep-bf16 o_proj,lm_head", "--quantize-lm-head: --keep-bf16 names lm_head"),
        ("m --smooth-alpha 1.1", "--smooth-alpha: "),
        ("m --smooth-alpha nan", "--smooth-alpha: "),
        ("m --drain-seconds inf", "--drain-seconds: "),
        ("m --served-model-name a:b", "--served-model-name: must hold no colon"),
        ("m --api-processes 0", "--api-processes: "),
        ("m --config /no/such.yaml", "--config: cannot read /no/such.yaml"),
    ],
)
def test_a_wrong_option_is_one_line(argv: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"octavo-serve: {said}" in refusal(argv.split(), capsys).replace("argument --port", "--port")


def test_a_wrong_value_is_blamed_on_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "o.yaml"
    file.write_text("prt: 1\n")
    assert f"{file}: prt: there is no such option; did you mean port?" in refusal(["m", "--config", str(file)], capsys)
    file.write_text("port: -1\n")
    assert f"{file}: port: " in refusal(["m", "--config", str(file)], capsys)
    file.write_text("- port\n")
    assert "--config: " in refusal(["m", "--config", str(file)], capsys)
    file.write_text("port: [\n")
    assert "--config: cannot read" in refusal(["m", "--config", str(file)], capsys)
    monkeypatch.setenv("OCTAVO_PORT", "many")
    assert "OCTAVO_PORT: " in refusal(["m"], capsys)

"""Imports point one way, torch stays in the engine, nothing unpickles or evaluates, public names are held."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["engine", "server", "client", "loadtest"]

# What a package may import beyond the standard library and itself.
THIRD_PARTY = {
    "client": {"httpx", "datasets", "pyarrow"},  # the last two inside functions, where data is read
    "loadtest": {"client", "aiohttp", "matplotlib"},  # the last inside a function, for PNG
}
WITHOUT_TORCH = ["block_manager", "config", "logs", "messages", "quant.formats", "scheduler", "sequence", "text"]
ENGINE_FOR_SERVER = {f"engine.{name}" for name in WITHOUT_TORCH if name != "scheduler"}

PUBLIC = {
    "engine": {"LLM", "ParameterError", "SamplingParams"},
    "server": set(),
    "client": set(),
    "loadtest": set(),
}

CODE_LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load"}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it: "a.b" for `import a.b`, `from a.b import c`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield node.module or ""


def loaded_by(modules: list[str]) -> set[str]:
    """Top-level names in sys.modules after a fresh interpreter has imported `modules`."""
    code = f"import sys\nimport {', '.join(modules)}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("package", ["server", "client", "loadtest"])
def test_server_client_and_loadtest_never_load_torch(package: str) -> None:
    loaded = loaded_by([module_name(file) for file in files(package)])
    assert not loaded & {"torch", "torchao", "triton", "transformers", "safetensors", "datasets", "pyarrow"}


def test_the_engines_host_side_never_loads_torch() -> None:
    assert "torch" not in loaded_by([f"engine.{name}" for name in WITHOUT_TORCH])


@pytest.mark.parametrize("package", list(THIRD_PARTY))
def test_client_and_loadtest_need_one_library(package: str) -> None:
    allowed = THIRD_PARTY[package] | {package} | sys.stdlib_module_names
    for file in files(package):
        for name in imports(file):
            assert name.split(".")[0] in allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_the_server_sees_only_the_engines_messages_text_and_settings() -> None:
    for file in files("server"):
        above = {"loadtest"} if file.name == "canary.py" else {"client", "loadtest"}  # the canary is a client
        for name in imports(file):
            assert name.split(".")[0] not in above, f"{file.relative_to(ROOT)} imports {name}"
            assert not name.startswith("engine") or name in ENGINE_FOR_SERVER, (
                f"{file.relative_to(ROOT)} imports {name}"
            )


def test_the_engine_sees_nothing_above_it() -> None:
    for file in files("engine"):
        for name in imports(file):
            assert name.split(".")[0] not in {"server", "client", "loadtest"}, (
                f"{file.relative_to(ROOT)} imports {name}"
            )


def test_models_and_kernels_know_no_scheduler() -> None:
    for part in ("models", "kernels", "quant"):
        for file in files(f"engine/{part}"):
            above = {"engine.scheduler", "engine.block_manager", "engine.core", "engine.messages", "engine.sequence"}
            assert not above & set(imports(file)), file.relative_to(ROOT)


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_unpickles_or_evaluates(package: str) -> None:
    for file in files(package):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert not CODE_LOADERS & {name.split(".")[0] for name in imports(file)}, file.relative_to(ROOT)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in UNSAFE_CALLS, f"{file.relative_to(ROOT)}:{node.lineno}"
                for keyword in node.keywords:
                    assert keyword.arg != "trust_remote_code", f"{file.relative_to(ROOT)}:{node.lineno}"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names(package: str) -> None:
    module = importlib.import_module(package)
    assert set(getattr(module, "__all__", [])) == PUBLIC[package]
    assert all(hasattr(module, name) for name in PUBLIC[package])
    assert (ROOT / package / "py.typed").exists()

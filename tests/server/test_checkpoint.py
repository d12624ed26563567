"""Finding and checking a model folder: each kind of damage is one line, and whole checkpoints pass."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import ModelError
from server.checkpoint import INDEX, check_checkpoint, resolve_model

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "models" / "pocket"


def write_safetensors(file: Path, header: dict[str, object], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensor(begin: int, end: int, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin], "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(POCKET / name, tmp_path / name)
    write_safetensors(tmp_path / "a.safetensors", {"x": tensor(0, 4), "y": tensor(4, 8)}, bytes(8))
    write_safetensors(tmp_path / "b.safetensors", {"z": tensor(0, 3), "__metadata__": {"format": "pt"}}, bytes(3))
    weight_map = {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def refusal(folder: Path, load_format: str = "auto") -> str:
    with pytest.raises(ModelError) as e:
        check_checkpoint(folder, load_format)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_whole_checkpoint_passes(folder: Path) -> None:
    check_checkpoint(folder, "auto")
    (folder / INDEX).unlink()
    check_checkpoint(folder, "auto")


def test_the_bundled_model_passes() -> None:
    check_checkpoint(POCKET, "auto")


def test_random_weights_need_no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    check_checkpoint(folder, "dummy")
    assert "no *.safetensors" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_side_files_must_be_there_and_be_json(folder: Path, name: str, load_format: str) -> None:
    (folder / name).write_text("{")
    assert name in refusal(folder, load_format)
    (folder / name).unlink()
    assert name in refusal(folder, load_format)


def test_a_shard_is_absent(folder: Path) -> None:
    (folder / "b.safetensors").unlink()
    assert "lacks 1 of 2 weight files, such as b.safetensors" in refusal(folder)


def test_a_tensor_is_absent(folder: Path) -> None:
    write_safetensors(folder / "b.safetensors", {"w": tensor(0, 3)}, bytes(3))
    assert "lacks z" in refusal(folder)


def test_the_index_may_not_lead_elsewhere(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    assert "not the name of a file beside it" in refusal(folder)


@pytest.mark.parametrize("size", [0, 7, 8, 20, -1])
def test_a_file_cut_short(folder: Path, size: int) -> None:
    file = folder / "a.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "a.safetensors is cut short" in refusal(folder)


def test_a_file_with_more(folder: Path) -> None:
    with (folder / "a.safetensors").open("ab") as f:
        f.write(b"more")
    assert "bytes too many" in refusal(folder)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"x": tensor(1, 8), "y": tensor(0, 1, "I4")}, "dtype 'I4'"),
        ({"x": tensor(0, 4), "y": tensor(5, 8)}, "begins at byte 5"),
        ({"x": tensor(0, 5), "y": tensor(4, 8)}, "begins at byte 4"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "y": tensor(4, 8)}, "does not fill"),
        ({"x": {"dtype": "U8", "shape": [-4, -1], "data_offsets": [0, 4]}, "y": tensor(4, 8)}, "no valid shape"),
        ({"x": {"dtype": "U8", "shape": [4], "data_offsets": [0]}, "y": tensor(4, 8)}, "no valid shape"),
        ({"x": 3, "y": tensor(0, 8)}, "dtype None"),
    ],
)
def test_a_header_that_lies(folder: Path, header: dict[str, object], said: str) -> None:
    write_safetensors(folder / "a.safetensors", header, bytes(8))
    assert said in refusal(folder)


def test_folders_are_found_and_missing_ones_named(tmp_path: Path) -> None:
    assert resolve_model(str(POCKET), "auto") == POCKET
    (tmp_path / "file").write_text("")
    for model, said in [
        ("no-such-folder", "does not exist"),
        (str(tmp_path / "none"), "does not exist"),
        (str(tmp_path / "file"), "is a file"),
        ("server/none", "not sought on the hub"),
    ]:
        with pytest.raises(ModelError, match=said):
            resolve_model(model, "auto")


class _Hub(http.server.BaseHTTPRequestHandler):
    """The part of a hub that snapshot_download asks for: one repository, with files that must not be taken."""

    FILES: dict[str, bytes] = {}  # noqa: RUF012 - filled by the fixture
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        sha = "0123456789abcdef0123456789abcdef01234567"
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        if path.startswith("/api/models/some/model/tree/"):
            listing = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.FILES.items()]
            body, kind = json.dumps(listing).encode(), "application/json"
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in self.FILES]
            body, kind = json.dumps({"id": "some/model", "sha": sha, "siblings": siblings}).encode(), "application/json"
        elif path.startswith("/some/model/resolve/") and path.rsplit("/", 1)[1] in self.FILES:
            body, kind = self.FILES[path.rsplit("/", 1)[1]], "application/octet-stream"
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:x}"')
        self.send_header("X-Repo-Commit", sha)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    _Hub.FILES = {file.name: file.read_bytes() for file in folder.iterdir()}
    _Hub.FILES |= {"model.bin": b"pickle", "modeling.py": b"code", "README.md": b"text"}
    _Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def resolve_in_a_process(model: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The hub's library reads its environment once, so each case has its own process."""
    code = (
        "import sys\nfrom server.checkpoint import *\n"
        "try:\n    folder = resolve_model(sys.argv[1], 'auto')\n"
        "    check_checkpoint(folder, 'auto')\n    print(folder)\n"
        "except ModelError as e:\n    sys.exit(str(e))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run([sys.executable, "-c", code, model], env=env, cwd="/", capture_output=True, text=True)


def test_a_hub_id_is_fetched_then_served_offline(hub: str, tmp_path: Path) -> None:
    home = str(tmp_path / "hf")
    done = resolve_in_a_process("some/model", HF_ENDPOINT=hub, HF_HOME=home)
    assert done.returncode == 0, done.stderr
    names = {file.name for file in Path(done.stdout.strip()).iterdir()}
    assert names == {"config.json", "tokenizer.json", INDEX, "a.safetensors", "b.safetensors"}
    assert home in done.stdout
    asked = len(_Hub.asked)
    again = resolve_in_a_process("some/model", HF_ENDPOINT=hub, HF_HOME=home, HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout and len(_Hub.asked) == asked


def test_an_incomplete_snapshot_is_noticed(hub: str, tmp_path: Path) -> None:
    del _Hub.FILES["b.safetensors"]
    done = resolve_in_a_process("some/model", HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 1 and "lacks 1 of 2 weight files" in done.stderr.splitlines()[-1]


def test_a_hub_that_does_not_help_is_one_line(hub: str, tmp_path: Path) -> None:
    home = str(tmp_path / "hf")
    for variables, said in [
        ({"HF_ENDPOINT": hub}, "neither a local folder nor a model at http"),
        ({"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ]:
        done = resolve_in_a_process("another/model", HF_HOME=home, **variables)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr

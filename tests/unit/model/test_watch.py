"""Files that change under a server: which changes are noticed, what is said, and how often."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ds_cp.errors import ModelError
from ds_cp.model import loading
from ds_cp.model.loading import load_model
from ds_cp.model.source import ModelSource, find_model
from ds_cp.model.watch import FilesWatch, watch_model
from tests.helpers.engines import tiny_llama
from tests.helpers.tiny import make_tiny_model

WHOLE = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def replace(file: Path) -> None:
    """As a download does: written beside, then renamed."""
    new = file.with_name("new")
    new.write_bytes(file.read_bytes())
    os.replace(new, file)


def rewrite(file: Path) -> None:
    size = file.stat().st_size
    file.write_bytes(bytes(size))
    os.utime(file, ns=(1, 1))


def cut(file: Path) -> None:
    os.truncate(file, 100)


STILL = "what was loaded at the start is still served; restart the server to serve them"
WRONG = "answers may be wrong from now on; restart the server"
CHANGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "replaced": (replace, "replaced", STILL),
    "rewritten": (rewrite, "written in place", WRONG),
    "cut": (cut, "written in place, ", WRONG),
    "removed": (Path.unlink, "removed", STILL),
}


@pytest.mark.parametrize("name", [WHOLE, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_said_once(folder: Path, name: str, change: str) -> None:
    said: list[str] = []
    watch = FilesWatch(find_model(str(folder)), said.append)
    assert not watch.look() and said == []
    make, how, effect = CHANGES[change]
    make(folder / name)
    assert watch.look()
    [line] = said
    assert (
        f"{name} ({how}" in line
        and str(folder) in line
        and line.endswith(effect if name == WHOLE else STILL)
    )
    assert "\n" not in line


def test_what_is_not_of_the_model_may_change(folder: Path) -> None:
    said: list[str] = []
    watch = FilesWatch(find_model(str(folder)), said.append)
    (folder / "README.md").write_text("new")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / WHOLE).read_bytes()  # a read changes nothing
    assert not watch.look() and said == []


def test_a_new_tokenizer_file_is_a_change(folder: Path) -> None:
    said: list[str] = []
    watch = FilesWatch(find_model(str(folder)), said.append)
    (folder / "added_tokens.json").write_text("{}")
    assert watch.look() and "added_tokens.json (new)" in said[0]


def test_links_are_followed(folder: Path, good: Path, tmp_path: Path) -> None:
    """A path that is led to another version of the model, and a file that is a link."""
    current, said = tmp_path / "current", list[str]()
    current.symlink_to(folder)
    watch = FilesWatch(find_model(str(current)), said.append)
    current.unlink()
    current.symlink_to(good)
    assert watch.look() and f"{WHOLE} (replaced)" in said[0]


def test_shards_and_their_index_are_watched(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    tiny_llama(hidden_size=16, intermediate_size=16).save_pretrained(folder, max_shard_size="10KB")
    for name in (sorted(folder.glob("*.safetensors"))[1].name, f"{WHOLE}.index.json"):
        said: list[str] = []
        watch = FilesWatch(find_model(str(folder)), said.append)
        replace(folder / name)
        assert watch.look() and name in said[0]


def test_a_gguf_file_is_watched_and_a_hub_id_is_not(tmp_path: Path) -> None:
    file, said = tmp_path / "m.gguf", list[str]()
    file.write_bytes(b"GGUF" + bytes(20))
    watch = FilesWatch(find_model(str(file)), said.append)
    cut(file)
    assert watch.look() and "m.gguf (written in place, 24 -> 100 bytes)" in said[0]
    assert not FilesWatch(ModelSource("hub", "owner/name"), said.append).look()


def test_a_model_that_cannot_be_read_is_not_watched(tmp_path: Path) -> None:
    assert watch_model(ModelSource("directory", str(tmp_path / "none")), print) is None
    assert watch_model(ModelSource("hub", "org/model"), print) is None  # nothing to look at


def test_the_thread_says_it_once_and_ends(folder: Path) -> None:
    said: list[str] = []
    watch = FilesWatch(find_model(str(folder)), said.append)
    watch.start(every_s=0.01)
    time.sleep(0.05)
    assert said == []
    replace(folder / WHOLE)
    limit = time.monotonic() + 60
    while not said and time.monotonic() < limit:
        time.sleep(0.01)
    replace(folder / "config.json")
    time.sleep(0.05)
    assert len(said) == 1


@pytest.mark.parametrize("name", [WHOLE, "config.json"])
def test_a_change_while_it_loads_ends_the_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What was checked is what was loaded, or the start says so."""
    real = loading._build

    def build(*args: object) -> object:
        replace(folder / name)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "_build", build)
    with pytest.raises(ModelError, match=rf"changed while it was loaded: {name} \(replaced\)"):
        load_model(find_model(str(folder)), torch.float32, torch.device("cpu"))

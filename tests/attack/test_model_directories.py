"""A model directory cannot run code, whatever it says: no pickle, no module, no kernel, no hub.

Every directory here holds a canary: a pickle, or a module, that leaves a mark when it is loaded or
imported. It is put under every name and on every route that transformers follows when it is
given the directory itself. Either the model is refused, by the name of what is wrong, or it loads
as if the trap were not there; the mark is absent, and nothing has been asked of the network.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import core_model_loading
from transformers.integrations import hub_kernels
from transformers.quantizers import quantizer_eetq, quantizer_mxfp4

from ds_cp.errors import ModelError
from ds_cp.model import loading, private_folder
from ds_cp.model.checkpoint import read_checkpoint
from ds_cp.model.data_only import data_only
from ds_cp.model.loading import load_config, load_model, load_tokenizer
from ds_cp.model.source import ModelSource, find_model
from tests.helpers.tiny import make_tiny_model

CPU = torch.device("cpu")
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Trap = Callable[[Path, "Canary"], None]


class Canary:
    """What leaves a mark when it is unpickled or imported."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "mark"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)

    def pickle(self, file: Path) -> None:
        """As ``torch.save`` writes it: a zip file with a pickle inside."""
        if not file.is_dir():
            written = io.BytesIO()
            torch.save({"model.embed_tokens.weight": self}, written)
            file.write_bytes(written.getvalue())

    def module(self, file: Path) -> None:
        file.write_text(f"import os\nos.mkdir({str(self.mark)!r})\nclass C: pass\n")

    @property
    def sang(self) -> bool:
        return self.mark.exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    found = Canary(tmp_path)
    yield found
    assert not found.sang


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every look-up of a host and every connection is counted, and fails."""
    asked: list[Any] = []

    def refuse(*what: Any, **_: Any) -> Any:
        asked.append(what)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield asked
    assert asked == []


def edit(file: Path, **changes: Any) -> None:
    found = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(found | changes))


def start(folder: Path) -> tuple[Any, Any, list[str]]:
    """Everything that a server's start reads of a model."""
    source, notes = find_model(str(folder)), []
    load_config(source)
    model = load_model(source, torch.float32, CPU, notes.append)
    return model, load_tokenizer(source, notes.append), notes


def same_as(good: Path, model: Any) -> bool:
    want = load_file(good / WHOLE)
    return all(torch.equal(value, want[name]) for name, value in model.state_dict().items())


def test_the_canary_sings(tmp_path: Path) -> None:
    """Or the tests below would show nothing."""
    canary = Canary(tmp_path)
    canary.pickle(tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert canary.sang


# --- weights that are pickles, under every name: refused, and the message names the file


def instead_of_weights(name: str) -> Trap:
    def trap(folder: Path, canary: Canary) -> None:
        (folder / WHOLE).unlink()
        canary.pickle(folder / name)

    return trap


def named_in_config(name: str) -> Trap:
    def trap(folder: Path, canary: Canary) -> None:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        canary.pickle(file)
        edit(folder / "config.json", transformers_weights=name)

    return trap


def named_in_index(name: str, index: str = INDEX) -> Trap:
    def trap(folder: Path, canary: Canary) -> None:
        canary.pickle(folder / name)
        names = load_file(folder / WHOLE)
        edit(folder / index, metadata={}, weight_map=dict.fromkeys(names, name))
        if index != INDEX:
            edit(folder / "config.json", transformers_weights=index)

    return trap


def linked_to_pickle(folder: Path, canary: Canary) -> None:
    canary.pickle(folder / "hidden.bin")
    (folder / WHOLE).unlink()
    (folder / WHOLE).symlink_to(folder / "hidden.bin")


def pickle_as_gguf(folder: Path, canary: Canary) -> None:
    (folder / WHOLE).unlink()
    canary.pickle(folder / "model.gguf")


REFUSED: dict[str, tuple[Trap, str]] = {
    "pytorch_model.bin": (instead_of_weights("pytorch_model.bin"), "pytorch_model.bin"),
    "model.pt": (instead_of_weights("model.pt"), "model.pt"),
    "consolidated.pth": (instead_of_weights("consolidated.00.pth"), "consolidated.00.pth"),
    "whole file": (instead_of_weights(WHOLE), WHOLE),
    "whole file by link": (linked_to_pickle, WHOLE),
    "named bin": (named_in_config("weights.bin"), "transformers_weights"),
    "named pt": (named_in_config("weights.pt"), "transformers_weights"),
    "named path": (named_in_config("../weights.safetensors"), "transformers_weights"),
    "named folder": (named_in_config("sub/weights.safetensors"), "transformers_weights"),
    "named pickle": (named_in_config("weights.safetensors"), "weights.safetensors"),
    "named bin index": (
        named_in_index("a.bin", "pytorch_model.bin.index.json"), "transformers_weights"),
    "named index of bin": (
        named_in_index("a.bin", "b.safetensors.index.json"), "b.safetensors.index.json"),
    "index of bin": (named_in_index("a.bin"), "a.bin"),
    "index of pickle": (named_in_index("a.safetensors"), "a.safetensors"),
    "index outside": (named_in_index("../a.safetensors"), "../a.safetensors"),
    "index of a folder": (named_in_index(".."), "'..'"),
    "only a GGUF that is none": (pickle_as_gguf, "*.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_pickled_weights_are_refused_by_name(folder: Path, canary: Canary, name: str) -> None:
    trap, named = REFUSED[name]
    trap(folder, canary)
    for work in (find_model, lambda where: load_model(
        ModelSource("directory", where), torch.float32, CPU)):  # fmt: skip
        with pytest.raises(ModelError) as caught:
            work(str(folder))
        message = str(caught.value)
        assert named in message and str(folder) in message and "\n" not in message


def test_a_pickle_called_gguf_is_refused(folder: Path, canary: Canary) -> None:
    canary.pickle(folder / "x.gguf")
    with pytest.raises(ModelError, match=r"x\.gguf is not a GGUF file"):
        find_model(str(folder / "x.gguf"))
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError, match=r"x\.gguf"):
            load(ModelSource("gguf", str(folder / "x.gguf")))


# --- traps beside or around good weights: not seen


def pickles_beside(folder: Path, canary: Canary) -> None:
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt",
                 "adapter_model.bin", "flax_model.msgpack", "vocab.pkl"):  # fmt: skip
        canary.pickle(folder / name)
    edit(folder / "pytorch_model.bin.index.json", weight_map={"a": "pytorch_model.bin"})
    canary.pickle(folder / ".metadata")  # torch's distributed checkpoints
    canary.pickle(folder / "__0_0.distcp")


def adapter(folder: Path, canary: Canary) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "auto_mapping": None}
    ))  # fmt: skip
    canary.pickle(folder / "adapter_model.bin")


def code(folder: Path, canary: Canary) -> None:
    canary.module(folder / "evil.py")
    (folder / "custom_generate").mkdir()
    canary.module(folder / "custom_generate" / "generate.py")
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    both = {"auto_map": dict.fromkeys(kinds, "evil.C") | {"AutoTokenizer": ["evil.C", "evil.C"]}}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        edit(folder / name, **both, custom_generate="evil", trust_remote_code=True)


def code_of_the_hub(folder: Path, canary: Canary) -> None:
    kinds = ("AutoConfig", "AutoModelForCausalLM")
    edit(folder / "config.json", auto_map=dict.fromkeys(kinds, "owner/name--evil.C"))


def config_says(**keys: Any) -> Trap:
    def trap(folder: Path, canary: Canary) -> None:
        edit(folder / "config.json", **keys)

    return trap


def tokenizer_says(**keys: Any) -> Trap:
    def trap(folder: Path, canary: Canary) -> None:
        canary.pickle(folder / "canary.bin")
        given = {k: str(folder / "canary.bin") if v is None else v for k, v in keys.items()}
        edit(folder / "tokenizer_config.json", **given)
        edit(folder / "special_tokens_map.json", **given)

    return trap


KERNEL = "owner/kernel"
PASSED: dict[str, tuple[Trap, str]] = {
    "pickles beside": (pickles_beside, "are not read: adapter_model.bin"),
    "adapter": (adapter, "adapter_model.bin"),
    "code": (code, "auto_map"),
    "code of the hub": (code_of_the_hub, "auto_map"),
    "attention kernel": (config_says(attn_implementation=KERNEL), "attn_implementation"),
    "attention kernel, private": (
        config_says(_attn_implementation=KERNEL, _attn_implementation_internal=KERNEL),
        "_attn_implementation"),
    "experts kernel": (config_says(experts_implementation=KERNEL), "experts_implementation"),
    "kernels": (
        config_says(use_kernels=True, kernel_config={"a": KERNEL}, allow_all_kernels=True),
        "use_kernels"),
    "fusion": (config_says(fusion_config={"x": {"y": 1}}), "fusion_config"),
    "other repository": (
        config_says(_name_or_path="owner/x", name_or_path="owner/x",
                    base_model_name_or_path="owner/x", configuration_files=["config.4.0.0.json"],
                    gguf_file="x.gguf", subfolder="sub"),
        "base_model_name_or_path"),
    "placement": (
        config_says(device_map="auto", tp_plan="auto", distributed_config={"tp_plan": "auto"}),
        "device_map"),
    "methods": (
        config_says(get_text_config="x", to_dict="x", attribute_map={"vocab_size": "x"},
                    base_model_tp_plan={"layers.*": "rowwise"}, sub_configs={}, extra_files=["a"]),
        "attribute_map"),
    "tokenizer files": (
        tokenizer_says(tokenizer_file=None, vocab_file=None, merges_file=None, spm_file=None,
                       added_tokens_file=None, fast_tokenizer_files=["canary.bin"],
                       init_inputs=["x"], sp_model_kwargs={"model_file": "canary.bin"}),
        "tokenizer_config.json names no code or files to load: vocab_file"),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSED)
def test_traps_around_good_weights_are_passed_by(
    folder: Path, good: Path, canary: Canary, name: str
) -> None:
    """The same weights and the same tokens as without them, and a note on each key that would have
    mattered."""
    trap, noted = PASSED[name]
    trap(folder, canary)
    model, tokenizer, notes = start(folder)
    assert same_as(good, model)
    assert noted in " ".join(notes)
    text = "Hello, you & I"
    assert tokenizer(text)["input_ids"] == load_tokenizer(find_model(str(good)))(text)["input_ids"]
    assert type(model).__module__.startswith("transformers.models.")
    assert model.config._attn_implementation in ("eager", "sdpa")


def test_transformers_sees_what_was_checked_and_nothing_else(folder: Path, canary: Canary) -> None:
    for trap in (pickles_beside, adapter, code):
        trap(folder, canary)
    (folder / "x.gguf").write_bytes(b"GGUF")
    os.mkfifo(folder / "vocab.json")  # a reader would wait for ever
    with private_folder.gguf_folder(folder / "x.gguf") as view:
        assert os.listdir(view) == ["model.gguf"]
    with private_folder.checkpoint_folder("M", read_checkpoint(folder)) as view:
        assert sorted(os.listdir(view)) == ["config.json", "generation_config.json", WHOLE]
        assert json.loads(Path(view, "generation_config.json").read_text()).keys() <= {
            "bos_token_id", "eos_token_id", "pad_token_id"}  # fmt: skip
    with private_folder.tokenizer_folder("M", folder) as view:
        assert sorted(os.listdir(view)) == [
            "additional_chat_templates", "chat_template.jinja", "config.json", "tokenizer.json",
            "tokenizer_config.json"]  # fmt: skip


def test_keys_steer_at_no_depth(tmp_path: Path, canary: Canary) -> None:
    """In the part of a larger model's config that describes the decoder."""
    text = hf.Gemma3TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = hf.Gemma3Config(text_config=text.to_dict(), vision_config=vision)
    hf.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    found = json.loads((tmp_path / "m" / "config.json").read_text())
    for part in (found["text_config"], found["vision_config"]):
        part |= {"_attn_implementation": KERNEL, "attn_implementation": KERNEL,
                 "auto_map": {"AutoConfig": f"{KERNEL}--evil.C"}}  # fmt: skip
    (tmp_path / "m" / "config.json").write_text(json.dumps(found))
    notes: list[str] = []
    model = load_model(find_model(str(tmp_path / "m")), torch.float32, CPU, notes.append)
    assert model.config.get_text_config()._attn_implementation in ("eager", "sdpa")
    assert any("text_config._attn_implementation" in note for note in notes)


@pytest.mark.parametrize(
    ("named", "reason"),
    [("AutoModelForCausalLM", "is not a tokenizer"), ("pipeline", "is not a tokenizer"),
     ("RagRetriever", "is not a tokenizer"), ("AutoTokenizer", "is not a tokenizer"),
     ("os", None), ("evil.C", None)],
)  # fmt: skip
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_class_is_a_tokenizer(
    folder: Path, canary: Canary, named: str, reason: str | None, file: str
) -> None:
    """transformers would call whatever of its own has that name."""
    instead_of_weights("pytorch_model.bin")(folder, canary)
    if file == "config.json":
        edit(folder / "tokenizer_config.json", tokenizer_class=None)
    edit(folder / file, tokenizer_class=named)
    source = ModelSource("directory", str(folder))
    if reason is None and file == "tokenizer_config.json":
        load_tokenizer(source)  # an unknown name means the tokenizer.json
        return
    with pytest.raises(ModelError, match=reason or "no usable tokenizer"):
        load_tokenizer(source)


def test_a_tokenizer_in_a_file_of_another_name_is_refused(folder: Path) -> None:
    """transformers would read the one for its version."""
    for listed, refused in ((["tokenizer.json"], False), (["tokenizer.4.0.0.json"], True)):
        edit(folder / "tokenizer_config.json", fast_tokenizer_files=listed)
        with pytest.raises(ModelError) if refused else nullcontext() as caught:
            load_tokenizer(find_model(str(folder)))
        if caught is not None:
            assert "fast_tokenizer_files names tokenizer.4.0.0.json" in str(caught.value)


def test_a_folder_for_temporary_files_that_cannot_be_written_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    source = find_model(str(folder))
    loads: tuple[Callable[[], Any], ...] = (
        lambda: load_config(source),
        lambda: load_model(source, torch.float32, CPU),
        lambda: load_tokenizer(source),
    )
    for load in loads:
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(folder / "none"))
            with pytest.raises(ModelError, match=r"none .*\(No such file.*set TMPDIR"):
                load()
        with monkeypatch.context() as patch:
            patch.setattr(private_folder, "_write", lambda *_: raises(full))
            with pytest.raises(ModelError, match=r"No space left.*set TMPDIR"):
                load()


def raises(err: Exception) -> None:
    raise err


def test_a_tokenizer_of_its_own_code_is_refused(folder: Path, canary: Canary) -> None:
    code(folder, canary)
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    with pytest.raises(ModelError, match=r"EvilTokenizer.*code of the model's own"):
        load_tokenizer(find_model(str(folder)))


# --- the second wall: a transformers that reads a pickle all the same


def unpicklers(file: Path) -> dict[str, Callable[[], Any]]:
    numpy_file = file.with_suffix(".npy")
    numpy.save(numpy_file, numpy.array([Canary(file.parent)], dtype=object))
    with zipfile.ZipFile(file) as zipped:
        [inner] = [n for n in zipped.namelist() if n.endswith("data.pkl")]
        raw = zipped.read(inner)
    return {
        "torch.load": lambda: torch.load(file, weights_only=False),
        "torch.load, weights only": lambda: torch.load(file, weights_only=True),
        "torch.serialization.load": lambda: torch.serialization.load(file, weights_only=False),
        "torch.jit.load": lambda: torch.jit.load(str(file)),
        "torch.hub.load": lambda: torch.hub.load(str(file.parent), "x", source="local"),
        "numpy.load": lambda: numpy.load(numpy_file, allow_pickle=True),
        "pickle.load": lambda: pickle.load(numpy_file.open("rb")),
        "pickle.loads": lambda: pickle.loads(raw),
        "pickle.Unpickler": lambda: pickle.Unpickler(file.open("rb")).load(),
    }  # fmt: skip


def test_nothing_is_unpickled_while_a_model_loads(tmp_path: Path, canary: Canary) -> None:
    file = tmp_path / "x.bin"
    canary.pickle(file)
    before = torch.load, numpy.load, torch.serialization.load
    with data_only("M"):
        for name, work in unpicklers(file).items():
            with pytest.raises(ModelError, match="model M wants .* to read a pickle") as caught:
                work()
            assert name.split(",")[0] in str(caught.value)
    assert (torch.load, numpy.load, torch.serialization.load) == before


@pytest.mark.parametrize("load", ["config", "model", "tokenizer"])
def test_every_call_of_transformers_is_behind_that_wall(
    folder: Path, canary: Canary, monkeypatch: pytest.MonkeyPatch, load: str
) -> None:
    canary.pickle(folder / "x.bin")

    def from_pretrained(*_: Any, **__: Any) -> Any:
        return torch.load(folder / "x.bin", weights_only=False)

    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(hf, name), "from_pretrained", from_pretrained)
    if load == "model":
        monkeypatch.setattr(loading, "_check_size", lambda *_: None)
    source = find_model(str(folder))
    work: dict[str, Callable[[], Any]] = {
        "config": lambda: load_config(source),
        "model": lambda: load_model(source, torch.float32, CPU),
        "tokenizer": lambda: load_tokenizer(source),
    }
    with pytest.raises(ModelError, match=r"wants torch\.load to read a pickle"):
        work[load]()


def test_other_threads_do_as_they_did(tmp_path: Path) -> None:
    """Those that ran before, and those that begin meanwhile: a server's requests, say."""
    torch.save({"a": 1}, tmp_path / "x.pt")
    go, seen = threading.Event(), {}

    def read(name: str) -> None:
        go.wait(20)
        seen[name] = (
            torch.load(tmp_path / "x.pt"),
            pickle.loads(pickle.dumps(name)),
            pickle.Unpickler(io.BytesIO(pickle.dumps(name))).load(),
            constants.is_offline_mode(),
        )

    old = threading.Thread(target=read, args=("old",))
    old.start()
    with data_only("M"):
        new = threading.Thread(target=read, args=("new",))
        new.start()
        kept = torch.load  # as a module does that is imported meanwhile
        go.set()
        for thread in (old, new):
            thread.join(20)
    assert seen == {name: ({"a": 1}, name, name, False) for name in ("old", "new")}
    assert kept(tmp_path / "x.pt") == {"a": 1}


def test_threads_that_transformers_begins_for_the_load_are_behind_the_wall(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads tensors in a pool of its own."""
    real, where = core_model_loading._materialize_copy, set[str]()

    def materialize(*args: Any) -> Any:
        where.add(threading.current_thread().name)
        with pytest.raises(ModelError, match="wants pickle.loads to read a pickle"):
            pickle.loads(pickle.dumps(1))
        return real(*args)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", materialize)
    load_model(find_model(str(folder)), torch.float32, CPU)
    assert where and threading.current_thread().name not in where


def test_a_process_that_is_forked_meanwhile_can_load() -> None:
    """The lock of a thread that is not there any more would be waited for an hour."""
    inside, done = threading.Event(), threading.Event()

    def load() -> None:
        with data_only("M"):
            inside.set()
            done.wait(20)

    loader = threading.Thread(target=load)
    loader.start()
    assert inside.wait(20)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        with data_only("N"):
            os._exit(0)
    _, status = os.waitpid(child, 0)
    done.set()
    loader.join(20)
    assert os.waitstatus_to_exitcode(status) == 0


def test_kernels_count_as_not_installed_while_a_model_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A quantization whose kernels come from the hub reads its weights without them, where it
    can."""

    def installed(*_: Any) -> bool:
        return True

    for module in (hub_kernels, quantizer_mxfp4, quantizer_eetq):
        monkeypatch.setattr(module, "is_kernels_available", installed)
    monkeypatch.setattr(quantizer_mxfp4, "is_triton_available", lambda *_: True)
    monkeypatch.setattr(quantizer_mxfp4, "is_accelerate_available", lambda *_: True)
    config = hf.Mxfp4Config()
    with data_only("M"):
        quantizer_mxfp4.Mxfp4HfQuantizer(config, pre_quantized=True).validate_environment()
        assert not quantizer_eetq.is_kernels_available()
    assert config.dequantize and quantizer_mxfp4.is_kernels_available()


def test_loads_take_turns(tmp_path: Path) -> None:
    """What is replaced is put back as it was, also when two threads load at once."""
    before = torch.load
    inside = threading.Barrier(1)

    def load() -> None:
        for _ in range(30):
            with data_only("M"):
                inside.wait(20)
                assert torch.load is not before

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert torch.load is before


def test_the_hub_is_out_of_reach_while_a_model_loads(no_network: list[Any]) -> None:
    """Also for a call that forgot to say ``local_files_only``."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with data_only("M"), pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info("owner/name")
    assert no_network == []


def test_a_pickle_put_there_after_the_check_is_not_read(
    folder: Path, canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the load, the file and the config are replaced."""
    real = loading._build

    def replaced(*args: Any) -> Any:
        canary.pickle(folder / "new")
        os.replace(folder / "new", folder / WHOLE)
        canary.pickle(folder / "pytorch_model.bin")
        edit(folder / "config.json", transformers_weights="pytorch_model.bin")
        return real(*args)

    monkeypatch.setattr(loading, "_build", replaced)
    with pytest.raises(ModelError, match="damaged weights"):
        load_model(find_model(str(folder)), torch.float32, CPU)


def test_a_named_index_is_followed_under_a_name_of_ours(folder: Path, good: Path) -> None:
    """Good weights with a name of their own still load."""
    state = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    save_file(state, folder / "a.safetensors", metadata={"format": "pt"})
    edit(folder / "b.safetensors.index.json", weight_map=dict.fromkeys(state, "a.safetensors"))
    edit(folder / "config.json", transformers_weights="b.safetensors.index.json")
    model, _, _ = start(folder)
    assert same_as(good, model)

"""Everything that a user can get wrong at a start: one line with the cause and the way out, code 2.

Mistakes that can be seen without torch are refused before it is imported, so within a moment.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig, MambaForCausalLM

from tests.helpers.jobs import END_S, ROOT, START_S, Job, command, ds_cp, free_port
from tests.helpers.warm_cli import Ended, WarmCli, warm_cli
from tests.launch.conftest import Start, Write

# Of every process of a job: it notes who looks for torch, which is before torch is imported.
NOTE_TORCH = """
import os, sys

class Note:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            open(os.environ["NOTE_TORCH"], "a").close()

sys.meta_path.insert(0, Note())
"""


@dataclass(frozen=True)
class Bed:
    """What a bad start is made of."""

    tiny: Path
    folder: Path
    config: Write
    taken_port: int

    def generate(self, *args: str, prompt: str = "Hello", **sections: Any) -> list[str]:
        return ["generate", "--config", self.config(**sections), "--prompt", prompt, *args]

    def serve(self, *args: str, **sections: Any) -> list[str]:
        return ["serve", "--config", self.config(**sections), *args]

    def with_config(self, text: str) -> list[str]:
        file = self.folder / "bad.json"
        file.write_text(text)
        return ["generate", "--config", str(file), "--prompt", "Hello"]

    def with_prompts(self, option: str, data: bytes | None) -> list[str]:
        file = self.folder / "prompts"
        if data is not None:
            file.write_bytes(data)
        return ["generate", "--config", self.config(), option, str(file)]

    def with_model(self, change: Callable[[Path], object]) -> list[str]:
        model = self.folder / "model"
        shutil.copytree(self.tiny, model)
        change(model)
        return self.generate(model=str(model))


def cut(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def only_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def change_config(model: Path, **values: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def unknown_architecture(model: Path) -> None:
    change_config(model, model_type="mamba_of_tomorrow", architectures=["MambaOfTomorrow"])


def state_space(model: Path) -> None:
    """A real architecture without softmax attention."""
    config = MambaConfig(vocab_size=258, hidden_size=16, state_size=4, num_hidden_layers=1)
    (model / "model.safetensors").unlink()
    MambaForCausalLM(config).save_pretrained(model)


def one_layer_more(model: Path) -> None:
    change_config(model, num_hidden_layers=3)


@dataclass(frozen=True)
class Case:
    """Arguments of ``ds-cp``, and what its one line has to say."""

    args: Callable[[Bed], list[str]]
    says: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


KV = {"block_size": 16}

SEEN_AT_ONCE = {
    "unknown key": Case(
        lambda b: b.generate(context_paralel={}), ("context_paralel", "context_parallel")
    ),
    "unknown inner key": Case(
        lambda b: b.generate(kv_cache={"block_sizes": 16}), ("block_sizes", "kv_cache.block_size")
    ),
    "out of range": Case(
        lambda b: b.generate(kv_cache={"block_size": 0}), ("kv_cache.block_size is 0", "1", "4096")
    ),
    "wrong type": Case(
        lambda b: b.generate(scheduler={"max_queue": "many"}), ("scheduler.max_queue", '"many"')
    ),
    "bad JSON": Case(lambda b: b.with_config('{"model": "x",}'), ("not valid JSON", "line 1")),
    "JSON that is no object": Case(lambda b: b.with_config("[1]"), ("must hold a JSON object",)),
    "missing config": Case(
        lambda b: ["generate", "--config", "none.json", "--prompt", "x"],
        ("none.json", "No such file"),
    ),
    "config is a directory": Case(
        lambda b: ["generate", "--config", str(b.folder), "--prompt", "x"],
        ("Is a directory",),
    ),
    "no config": Case(lambda b: ["generate", "--prompt", "x"], ("--config FILE",)),
    "missing model": Case(lambda b: b.generate(model="/no/such"), ("/no/such", "no model at")),
    "empty model": Case(lambda b: b.with_model(empty), ("has no config.json",)),
    "truncated weights": Case(lambda b: b.with_model(cut), ("truncated", "bytes of")),
    "pickle weights": Case(
        lambda b: b.with_model(only_pickle), ("pytorch_model.bin", "convert them to safetensors")
    ),
    "bad dtype": Case(
        lambda b: b.generate(dtype="float33"), ('dtype is "float33"', "fp32", "bf16")
    ),
    "bad mode": Case(
        lambda b: b.generate(context_parallel={"mode": "rings"}),
        ('context_parallel.mode is "rings"', "ring", "tree"),
    ),
    "port in use": Case(
        lambda b: b.serve("--port", str(b.taken_port)), ("in use", "--port N", "0 takes any")
    ),
    "port out of range": Case(
        lambda b: b.serve("--port", "70000"), ("server.port is 70000", "65535")
    ),
    "open without a key": Case(
        lambda b: b.serve("--host", "0.0.0.0"), ("server.api_key is not set", "127.0.0.1")
    ),
    "address of another machine": Case(
        lambda b: b.serve(server={"host": "203.0.113.7", "port": 0, "api_key": "k"}),
        ("cannot listen on 203.0.113.7", "server.port"),
    ),
    "tp_size does not divide": Case(
        lambda b: b.generate("--ranks", "2", tensor_parallel={"tp_size": 3}),
        ("tp_size 3 does not divide the 2 ranks", "launch a multiple of 3"),
    ),
    "cp size does not match": Case(
        lambda b: b.generate("--ranks", "2", context_parallel={"size": 4}),
        ("context_parallel.size 4", "2 ranks", "auto"),
    ),
    "budgets against cp size": Case(
        lambda b: b.generate(
            context_parallel={"size": 2}, kv_cache=KV | {"tokens_per_rank": [64, 64, 64]}
        ),
        ("tokens_per_rank lists 3", "size is 2"),
    ),
    "less than a block": Case(
        lambda b: b.generate(kv_cache=KV | {"tokens_per_rank": 15}),
        ("tokens_per_rank is 15", "16 tokens", "raise it or lower"),
    ),
    "two budgets": Case(
        lambda b: b.generate(kv_cache=KV | {"tokens_per_rank": 64, "memory_per_rank": "1MiB"}),
        ("both set", "leave the other out"),
    ),
    "too many ranks": Case(lambda b: b.generate("--ranks", "5000"), ("5000", "from 1 to 1024")),
    "RANK alone": Case(
        lambda b: b.generate(), ("WORLD_SIZE is not set",), {"RANK": "0", "LOCAL_RANK": "0"}
    ),
    "unknown interface": Case(
        lambda b: b.generate(comm={"interface": "eth77"}), ("eth77", "name one of those")
    ),
    "prompt file missing": Case(
        lambda b: b.with_prompts("--prompt-file", None), ("prompts", "No such file")
    ),
    "prompt file binary": Case(
        lambda b: b.with_prompts("--prompt-file", b"PNG\x00\x01"), ("not text", "byte 3")
    ),
    "prompt file not UTF-8": Case(
        lambda b: b.with_prompts("--prompt-file", b"caf\xe9"), ("not UTF-8", "at 3")
    ),
    "prompt file empty": Case(
        lambda b: b.with_prompts("--prompt-file", b""), ("is empty", "at least one character")
    ),
    "broken line of prompts": Case(
        lambda b: b.with_prompts("--prompts-file", b'"fine"\n\n{"prompt": "x"\n'),
        ("line 3", "not valid JSON"),
    ),
    "unknown field of a prompt": Case(
        lambda b: b.with_prompts("--prompts-file", b'{"prompt": "x", "max_token": 3}\n'),
        ("line 1", "max_token", "max_tokens"),
    ),
    "negative max tokens": Case(
        lambda b: b.generate("--max-tokens", "-1"), ("max_tokens is -1", "from 1 to")
    ),
}

# Needs torch, transformers or the ranks to be seen.
SEEN_WHILE_LOADING = {
    "unknown architecture": Case(
        lambda b: b.with_model(unknown_architecture), ("mamba_of_tomorrow", "choose a decoder")
    ),
    "no attention": Case(
        lambda b: b.with_model(state_space), ("MambaForCausalLM", "linear_attention", "softmax")
    ),
    "weights missing": Case(
        lambda b: b.with_model(one_layer_more), ("lacks 9 of its weights", "model.layers.2.")
    ),
    "longer than the model": Case(
        lambda b: b.generate(max_model_len=100_000),
        ("max_model_len is 100000", "512 positions", "auto"),
    ),
    "memory for less than a block": Case(
        lambda b: b.generate(kv_cache=KV | {"memory_per_rank": 4096}),
        ("less than one block of 16", "raise the budget"),
    ),
    "more than the machine": Case(
        lambda b: b.generate(kv_cache=KV | {"memory_per_rank": "900TiB"}),
        ("bytes", "are free", "lower kv_cache"),
    ),
    "flash_attn on CPU": Case(
        lambda b: b.generate(attention={"backend": "flash_attn"}),
        ("flash_attn", "set attention.backend to auto"),
    ),
    "nccl without CUDA": Case(
        lambda b: b.generate(comm={"backend": "nccl"}),
        ("comm.backend nccl", "CUDA", "set comm.backend to gloo"),
        {"CUDA_VISIBLE_DEVICES": ""},
    ),
    "cuda without a device": Case(
        lambda b: b.generate(device="cuda"),
        ("device is cuda", "no CUDA device", "set device to cpu or auto"),
        {"CUDA_VISIBLE_DEVICES": ""},
    ),
}

STARTED = ("no attention", "nccl without CUDA")  # of those, in a process of their own as well

WITH_RANKS = {
    "budgets of wrong length": Case(
        lambda b: b.generate("--ranks", "2", kv_cache=KV | {"tokens_per_rank": [64, 64, 64]}),
        ("tokens_per_rank lists 3", "2 context-parallel ranks", "one per rank"),
    ),
    "prompt too long": Case(
        lambda b: b.generate("--ranks", "2", "--max-tokens", "10", prompt="x" * 300),
        ("309 tokens", "300 prompt + 10 new", "128"),
    ),
    "server of too long a model": Case(
        lambda b: b.serve("--ranks", "2", max_model_len=100_000),
        ("max_model_len is 100000", "512 positions"),
    ),
}


@pytest.fixture
def bed(tiny: Path, tmp_path: Path, config: Write) -> Iterator[Bed]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield Bed(tiny, tmp_path, config, taken.getsockname()[1])


def refused(job: Job, limit_s: float, says: tuple[str, ...]) -> None:
    """Code 2, nothing on stdout, and on stderr one line alone, which says it all."""
    assert job.wait(limit_s) == 2, job.story()
    job.gone(END_S)
    assert job.out == "", job.story()
    one_line(job, says)


def one_line(job: Job | Ended, says: tuple[str, ...]) -> None:
    """Nothing but one of our lines on stderr."""
    errors(job, 1, says)
    assert job.err.count("\n") == 1, job.story()


def errors(job: Job | Ended, count: int, says: tuple[str, ...]) -> None:
    """That many of our lines among what launchers print, each with the words."""
    lines = [line for line in job.err.splitlines() if line.startswith("ds_cp: error: ")]
    assert len(lines) == count and "Traceback" not in job.err, job.story()
    for line in lines:
        missing = [part for part in says if part not in line]
        assert not missing, f"not said: {missing}{job.story()}"


@pytest.fixture
def noted(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A file that is there once a process has looked for torch, and the environment for that."""
    folder = tmp_path / "noting"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NOTE_TORCH)
    file = tmp_path / "torch"
    return file, {"NOTE_TORCH": str(file), "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.mark.parametrize("name", SEEN_AT_ONCE)
def test_seen_at_once(
    name: str, bed: Bed, start: Start, noted: tuple[Path, dict[str, str]]
) -> None:
    case, (torch, env) = SEEN_AT_ONCE[name], noted
    refused(start([*ds_cp(), *case.args(bed)], case.env | env), START_S, case.says)
    assert not torch.exists()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCli]:
    with warm_cli(tmp_path_factory.mktemp("warm")) as found:
        yield found


@pytest.mark.parametrize("name", SEEN_WHILE_LOADING)
def test_seen_while_loading(name: str, bed: Bed, warm: WarmCli) -> None:
    """All that a start says by itself; with what its imports might say: ``STARTED``."""
    case = SEEN_WHILE_LOADING[name]
    ended = warm.run(case.args(bed), case.env)
    assert ended.code == 2 and ended.out == "" and not ended.left, ended.story()
    one_line(ended, case.says)


@pytest.mark.parametrize("name", STARTED)
def test_started_to_be_refused(
    name: str, bed: Bed, start: Start, noted: tuple[Path, dict[str, str]]
) -> None:
    case, (torch, env) = SEEN_WHILE_LOADING[name], noted
    refused(start([*ds_cp(), *case.args(bed)], case.env | env), START_S, case.says)
    assert torch.exists(), "it would be seen"


@pytest.mark.parametrize("name", WITH_RANKS)
def test_seen_by_ranks(name: str, bed: Bed, start: Start) -> None:
    """Rank 0 alone prints the error, whichever rank found it."""
    case = WITH_RANKS[name]
    job = start([*ds_cp(), *case.args(bed)], case.env)
    assert job.wait(START_S) == 2, job.story()
    job.gone(END_S)
    assert job.out == "", job.story()
    errors(job, 1, case.says)


def test_ranks_with_different_configs(bed: Bed, start: Start) -> None:
    """Two ranks started by hand."""
    port = str(free_port())
    jobs = []
    for rank in range(2):
        args = bed.generate(kv_cache=KV | {"tokens_per_rank": 64 * (1 + rank)})
        file = Path(args[args.index("--config") + 1])
        args[args.index("--config") + 1] = str(file.rename(bed.folder / f"rank{rank}.json"))
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}
        jobs.append(start([sys.executable, str(ROOT / "launch" / "generate.py"), *args[1:]], place))
    for rank, job in enumerate(jobs):
        assert job.wait(START_S) == 2, job.story()
        assert job.out == "", job.story()
        errors(job, 1 if rank == 0 else 0, ("ranks [1]", "another config", "the same file"))


def test_mpi_and_world_size_disagree(bed: Bed, start: Start) -> None:
    args = bed.generate()[1:]
    job = start(command("mpirun", "generate", 2, args), {"WORLD_SIZE": "4"})
    assert job.wait(START_S) == 2, job.story()
    job.gone(END_S)
    errors(job, 1, ("4 ranks (WORLD_SIZE)", "MPI sees 2", "mpirun -np 4"))

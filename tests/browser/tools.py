"""What the browser tests need beside the package, kept in a cache folder of the checkout."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "browser"
LIBRARY = CACHE / "python"
AXE = CACHE / "axe.min.js"
PLAYWRIGHT = "playwright==1.65.2"
AXE_VERSION = "4.14.1"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOW = "install Chromium (Debian: apt-get install chromium), then run make browser"


def chromium() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def missing() -> str | None:
    """Why the tests cannot run here, and what to do; None when they can."""
    if str(LIBRARY) not in sys.path and LIBRARY.is_dir():
        sys.path.append(str(LIBRARY))
    if chromium() is None:
        return f"no Chromium was found; {HOW}"
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed; make browser fetches it"
    return None


def fetch() -> None:
    """Install playwright's client (it brings no browser) and axe-core into the cache folder.
    Raises ``CalledProcessError`` when pip fails; without npm there is no axe-core."""
    if not (LIBRARY / "playwright").is_dir() and importlib.util.find_spec("playwright") is None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(LIBRARY)]
        subprocess.run([*pip, PLAYWRIGHT], check=True, timeout=600)
    npm = shutil.which("npm")
    if AXE.is_file() or npm is None:
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    package = f"axe-core@{AXE_VERSION}"
    done = subprocess.run(
        [npm, "pack", "--silent", package], cwd=CACHE, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        print(f"axe-core could not be fetched: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return
    archive = CACHE / done.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/axe.min.js")
        assert member is not None
        AXE.write_bytes(member.read())
    archive.unlink()

"""Archives from the network: by pooch, which checks them, or as a wheel by pip."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

from lunet_fast.recsys.data.archives import read_archive
from lunet_fast.recsys.data.datasets import Wheel
from lunet_fast.recsys.data.errors import Unavailable
from lunet_fast.training.outside import ProgramError, run_program

CONNECT_SECONDS = 10
READ_SECONDS = 30
PIP_SECONDS = 180


def download(url: str, md5: str) -> bytes:
    try:
        import pooch
    except ImportError as error:
        raise Unavailable("pooch is not installed: pip install 'lunet-fast[train]'") from error
    pooch_logger = pooch.get_logger()
    level = pooch_logger.level
    pooch_logger.setLevel(logging.WARNING)  # it would report the temporary file
    try:
        with tempfile.TemporaryDirectory(prefix="lunet-fast-") as folder:
            downloader = pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, READ_SECONDS))
            path = pooch.retrieve(url, f"md5:{md5}", fname="download.zip", path=folder, downloader=downloader)
            return read_archive(Path(path))
    except Exception as error:  # of requests, urllib3, ssl, the file system, or pooch's on another checksum
        raise Unavailable(_one_line(f"{type(error).__name__}: {error}")) from error
    finally:
        pooch_logger.setLevel(level)


def pip_download(wheel: Wheel) -> bytes:
    """The wheel through pip, which knows the mirrors, proxies and certificates of this machine."""
    # What the user has set for a slow mirror stays; without it, a machine without network must not wait
    # minutes.
    environment = {"PIP_DEFAULT_TIMEOUT": "15", "PIP_RETRIES": "1", **os.environ}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    with tempfile.TemporaryDirectory(prefix="lunet-fast-") as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "--dest",
            folder,
            "-r",
            str(wanted),
        ]
        command = [sys.executable, "-m", "pip", "download", *options]
        try:
            run_program(command, "pip download", Path(folder), environment, PIP_SECONDS, telling=("ERROR",))
        except ProgramError as error:
            raise Unavailable(_one_line(str(error))) from error
        try:
            return read_archive(Path(folder) / wheel.file)
        except OSError as error:
            raise Unavailable(f"pip download left no {wheel.file}") from error


def _one_line(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."

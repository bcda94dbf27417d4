"""Files of a run: JSON and safetensors, no pickle, and the folder that they lie in.

Every file is written beside its place and moved there when it is complete, so that a reader or a crash finds
the old file or the new one. safetensors is imported on use: it belongs to the extra ``lunet-fast[train]``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lunet_fast.training.schema import DIGEST_FROM, FORMAT_VERSION, Schema, one_line, shown, violation
from lunet_fast.training.sharding import BLOCK, Dealt

MOST_HEADER_BYTES = 100_000_000
"""Of a safetensors file; the package of that name takes no more either."""

MOST_JSON_BYTES = 64 << 20

# A process that is killed while it writes leaves a file of this name behind.
_TEMPORARY = ".lunet-fast-"


class CheckpointError(ValueError):
    """A model or checkpoint file cannot be used; the message names the file and why.

    In one line that is fit for a terminal, though others' messages and what the file says are in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, flush it to disk and move it to ``path`` in one step.

    ``OSError`` naming the file where that cannot be done, as on a full disk; ``path`` is as it was then.
    """
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}{path.suffix}")
    made = False
    try:
        # Nobody's file and nobody's link; as public as this process's umask says, which stays as it is.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        made = True
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException as error:
        if made:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise type(error)(error.errno, f"cannot write {path}: {error.strerror or error}") from error
        raise


def _flush_folder(folder: Path) -> None:
    """Flush the folder's own entries, without which a power cut may undo the move. POSIX only."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an indented JSON object atomically; NaN and infinities raise ``ValueError``, as JSON has none."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib as PNG, atomically."""
    # Without the version of matplotlib in the file, the same figure gives the same bytes.
    write_atomically(path, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; :class:`CheckpointError` where the file holds anything else.

    A missing file raises ``FileNotFoundError``.
    """
    with opened(path) as (file, size):
        if size > MOST_JSON_BYTES:
            raise CheckpointError(f"{path}: has {size} bytes, more than any file of a run")
        text = file.read()
    values = _parsed(path, text, "not a JSON file")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not a JSON object")
    return values


def _parsed(path: Path, text: str | bytes, otherwise: str) -> Any:
    """The value of a JSON text; numbers that JSON does not have are refused."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {otherwise} ({error})") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file to read, and its size. What is none is refused before anything waits for it.

    A missing file raises ``FileNotFoundError``.
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes into it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        if path.is_dir():  # which some systems do not open
            raise CheckpointError(f"{path}: a folder, where a file is wanted") from error
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise CheckpointError(f"{path}: {kind}, where a file is wanted")
    with os.fdopen(handle, "rb") as file:
        yield file, status.st_size


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | Dealt], kind: str, state: dict[str, Any]
) -> None:
    """Write a safetensors file atomically, with ``state`` as JSON in its header.

    The bytes are those that the package of that name would write of the whole tensors, one metadata key
    alone. It takes them whole, though, and a table that is dealt to several processes passes by in blocks.
    """
    # By way of JSON, so that what is digested is what will be read.
    values = json.loads(json.dumps({"format": kind, "version": FORMAT_VERSION, **state}, allow_nan=False))
    write_atomically(path, lambda temporary: _write_safetensors(temporary, tensors, values))


_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The types' names in a safetensors file, in the order that its tensors have there."""


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor | Dealt], values: dict[str, Any]) -> None:
    layout = list(_DTYPES)
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (layout.index(item[1].dtype), item[0])):
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        described = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        entries[name] = {**described, "data_offsets": [start, end]}

    def head(sha256: str) -> bytes:
        metadata = {"lunet_fast": json.dumps({**values, "sha256": sha256})}
        text = json.dumps({"__metadata__": metadata, **entries}, ensure_ascii=False, separators=(",", ":"))
        data = text.encode()
        data += b" " * (-len(data) % 8)
        return len(data).to_bytes(8, "little") + data

    # Digested as it is written, since a dealt table passes by once; the header is completed at the end.
    total = _digest_of_header(values)
    with path.open("wb") as file:
        first = len(head("0" * 64))
        for name in sorted(tensors):
            tensor = tensors[name]
            total.update(_described(name, tensor))
            file.seek(first + entries[name]["data_offsets"][0])
            for block in tensor.blocks() if isinstance(tensor, Dealt) else [tensor]:
                data = _bytes(block)
                total.update(data)
                file.write(data)
        file.seek(0)
        file.write(head(total.hexdigest()))


def read_tensors(
    path: Path, kind: str, schema: Schema | None = None, *, mapped: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote: tensors on the CPU and the header's JSON.

    A missing file raises ``FileNotFoundError``; a damaged, foreign or newer one, or one whose header is not
    of ``schema`` where that is given, :class:`CheckpointError`. From version 2 of the format on, what is
    returned is what was written, bit for bit: its SHA-256 is in the header. Memory: twice the file as it lies
    on the disk, whatever it claims to hold; with ``mapped`` none but the system's cache of the file, which
    must stay as it is while the tensors are there.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    with opened(path) as (file, size):
        text = _metadata(path, file, size)
        header = _checked_header(path, text, kind, schema)
        file.seek(0)
        try:
            if mapped:
                with safe_open(path, "pt") as content:
                    tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            else:
                tensors = load(file.read())
        except MemoryError as error:
            raise CheckpointError(f"{path}: its {size} bytes do not fit into memory") from error
        except (SafetensorError, KeyError, TypeError, AssertionError, RuntimeError, ValueError) as error:
            # The others are what safetensors makes of types that this PyTorch does not have.
            raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    recorded = header.pop("sha256", None)
    if recorded is None and header["version"] >= DIGEST_FROM:
        raise CheckpointError(
            f"{path}: sha256 is missing, which files of version {header['version']} of the format have"
        )
    if recorded is not None and recorded != digest(tensors, header):
        raise CheckpointError(
            f"{path}: damaged, its contents are not those that were written (the SHA-256 differs): copy or "
            "fetch it again"
        )
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise CheckpointError(f"{path}: the tensor {name!r} holds NaN or infinite values")
    return tensors, header


def kind_of(path: Path) -> str:
    """The ``kind`` that a file says it is of, "" where it says none; errors as :func:`read_tensors`."""
    with opened(path) as (file, size):
        header = _parsed(path, _metadata(path, file, size), "the header is not JSON")
    return str(header.get("format", "")) if isinstance(header, dict) else ""


def _metadata(path: Path, file: BinaryIO, size: int) -> str:
    """The text under the key ``lunet_fast`` of an open safetensors file of ``size`` bytes."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, MOST_HEADER_BYTES):
        # Read as a length, the first bytes of these are always too large.
        if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            what = "a pickle" if start[:1] == b"\x80" else "a zip file, such as torch.save writes"
            raise CheckpointError(
                f"{path}: not a safetensors file but {what}. That is not read: unpickling may run any program"
            )
        claim = f"claims a header of {length} bytes" if len(start) == 8 else "has no header"
        raise CheckpointError(f"{path}: not a whole safetensors file: of {size} bytes, it {claim}")
    header = _parsed(path, file.read(length), "not a whole safetensors file")
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get("lunet_fast") if isinstance(metadata, dict) else None
    return text if isinstance(text, str) else "null"


def _checked_header(path: Path, text: str, kind: str, schema: Schema | None) -> dict[str, Any]:
    """The header of a file of ``kind``, of a version that this release reads, of ``schema`` if given."""
    header = _parsed(path, text, "the header is not JSON")
    if not isinstance(header, dict) or header.get("format") != kind:
        raise CheckpointError(f"{path}: this safetensors file is not a {kind} file")
    version = header.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: version {shown(version)} of the format; this release reads up to {FORMAT_VERSION}: "
            "update lunet-fast"
        )
    wrong = violation(header, schema) if schema is not None else None
    if wrong is not None:
        raise CheckpointError(f"{path}: {wrong}")
    return header


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of what a file holds: the header without its ``sha256``, and all tensors.

    Defined in :mod:`~lunet_fast.training.schema`.
    """
    total = _digest_of_header(header)
    for name in sorted(tensors):
        total.update(_described(name, tensors[name]))
        total.update(_bytes(tensors[name]))
    return total.hexdigest()


def _digest_of_header(header: Mapping[str, Any]) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode("ascii"))


def _described(name: str, tensor: Tensor | Dealt) -> bytes:
    described = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
    return json.dumps(described, separators=(",", ":")).encode("ascii")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; O(BLOCK) memory."""
    if not tensor.is_floating_point():
        return True
    return all(bool(torch.isfinite(block).all()) for block in tensor.detach().reshape(-1).split(BLOCK))


# Run folders ------------------------------------------------------------------------------------------------


DIGESTS_SINCE = ("ids_sha256", "rows_sha256")
"""What ``config.json`` says of the data and did not at first."""


class RunFolderError(ValueError):
    """A run folder cannot be used as asked; the message names it and what to do."""


class RunFolder:
    """The files of one training.

    ``config.json``, ``metrics.json``, ``model.safetensors``, ``loss.png``; ``candidates.safetensors`` where
    ratings are held out for ranking; for resuming, ``checkpoints/``; ``.lock``, empty, held while training.
    ``metrics.json`` is written last, so a folder that has one is finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics = path / "config.json", path / "metrics.json"
        self.model, self.loss = path / "model.safetensors", path / "loss.png"
        self.candidates = path / "candidates.safetensors"
        self.checkpoints = path / "checkpoints"

    def is_finished(self) -> bool:
        return self.metrics.is_file()

    def is_started(self) -> bool:
        """Whether there is work in the folder that a new training would replace."""
        return self.is_finished() or self.model.is_file() or any(self.checkpoints.glob("*.safetensors"))

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder and see that it can be written.

        :class:`RunFolderError` where it cannot, where it holds another training or one is going on in it, or
        where it, or a folder or the lock in it, is a link. Nothing is deleted here. Of ``resume`` and
        ``overwrite`` at most one may be given.
        """
        if resume and overwrite:
            raise RunFolderError(
                "resume=True goes on with a training and overwrite=True replaces it: give one of the two"
            )
        self._refuse_links()
        self._refuse_another(resume=resume, overwrite=overwrite)
        if resume and self.is_finished():
            return  # to be read only
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(prefix=_TEMPORARY, dir=self.checkpoints):
                pass
        except OSError as error:
            raise RunFolderError(
                f"cannot write into {self.path} ({error}): choose another out=FOLDER"
            ) from error
        with self.locked():
            pass

    def _refuse_another(self, *, resume: bool, overwrite: bool) -> None:
        if self.is_started() and not resume and not overwrite:
            state = "a finished training" if self.is_finished() else "an interrupted training"
            raise RunFolderError(
                f"{self.path} holds {state}: add resume=True to go on with it, overwrite=True to "
                "replace it, or choose another out=FOLDER"
            )

    def _refuse_links(self) -> None:
        """What is deleted and written here lies here, and not where somebody's link leads."""
        for place in (self.path, self.checkpoints, self.path / ".lock"):
            if place.is_symlink():
                raise RunFolderError(
                    f"{place} is a link to {place.readlink()}, and what a training deletes and writes must "
                    "lie in its own folder: name the folder itself as out=FOLDER, or remove the link"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, this process alone writes into the folder; :class:`RunFolderError` where another one does.

        The operating system releases the lock of a process that has died, so that it stops nobody.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise RunFolderError(
                f"another process is training in {self.path}: wait for its end, or choose another out=FOLDER"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def begin(
        self,
        config: dict[str, Any],
        *,
        resume: bool,
        overwrite: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Record the settings of the training that now starts, under the lock.

        Resuming, they are checked; otherwise the former training is deleted. So is what a killed process left
        half written. As of :meth:`prepare`, whose answers may be old by now: another process may have trained
        here meanwhile, to whose end this one's data were being read.
        """
        self._refuse_links()
        self._refuse_another(resume=resume, overwrite=overwrite)
        for folder in (self.path, self.checkpoints):
            for half_written in folder.glob(f"{_TEMPORARY}*"):
                half_written.unlink(missing_ok=True)
        if resume and self.config.is_file():
            self.check(config, defaults)
            return
        for old in (
            self.metrics,
            self.model,
            self.loss,
            self.candidates,
            *self.checkpoints.glob("*.safetensors"),
        ):
            old.unlink(missing_ok=True)
        write_json(self.config, config)

    def check(self, config: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        """:class:`RunFolderError` unless the folder's training has these settings and data.

        Where the data were read, ``source`` and ``reading``, may differ; a folder of a release that did not
        record a digest has none, and settings that it did not have were their ``defaults``.
        """
        recorded = {**(defaults or {}), **read_json(self.config)}
        # By way of JSON, which has one kind of sequence.
        wanted = json.loads(json.dumps(config))
        for name in sorted(wanted.keys() | recorded.keys()):
            if name in ("source", "reading") or (name in DIGESTS_SINCE and name not in recorded):
                continue
            if wanted.get(name) != recorded.get(name):
                what = "settings and data" if name.endswith("_sha256") else "settings"
                theirs, ours = (shown(values.get(name), 80) for values in (recorded, wanted))
                raise RunFolderError(
                    f"{self.path} was trained with {name}={theirs}, not {ours}: give the same {what} to "
                    "resume it, or choose another out=FOLDER"
                )

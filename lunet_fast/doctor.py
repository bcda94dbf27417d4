"""Whether this installation works: versions, extras, devices, a check of the layers, data and cache.

:func:`examine` is what ``lunet-fast doctor`` prints. It changes nothing, fetches nothing and raises nothing:
what fails is a finding.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import lunet_fast
from lunet_fast.layers.lunet import LUNet
from lunet_fast.ops import dispatch
from lunet_fast.training.places import CACHE_VARIABLE, DATA_VARIABLE, cache_folder

if TYPE_CHECKING:
    from lunet_fast.recsys.data.movielens import Located

__all__ = ["Copy", "Finding", "examine", "find_movielens"]

EXTRAS = {
    "train": (
        *("typer", "rich", "pandas", "pydantic", "matplotlib", "jinja2", "markdown-it-py"),
        *("pooch", "safetensors", "filelock"),
    ),
    "parquet": ("pyarrow",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "bench": ("nflows", "normflows", "zuko", "cornac", "myfm"),
    "density": ("scikit-learn", "rdata", "h5py"),
    "text": ("scikit-learn",),
    "tune": ("optuna",),
    "baselines": ("cornac", "implicit", "myfm", "scikit-surprise", "scipy"),
}
"""The packages of each extra."""
_MODULES = {"markdown-it-py": "markdown_it", "scikit-learn": "sklearn", "scikit-surprise": "surprise"}
"""Packages that are imported under another name."""

_EXACT = 1e-9
_SINGLE = 1e-3
_FIX_LAYERS = (
    "install torch and triton in versions that fit; LUNET_FAST_BACKEND=reference does without triton"
)


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ``state`` is ``ok``, ``absent`` (it can be done without) or ``broken``."""

    section: str
    name: str
    state: str
    text: str
    fix: str = ""
    """What to do about it, where there is something."""


def examine() -> list[Finding]:
    """Every finding, section by section; a few seconds."""
    return [*_versions(), *_extras(), *_devices(), *_checks(), *_data()]


# Packages ---------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding(
        "versions", "lunet_fast", "ok", f"{lunet_fast.__version__} in {Path(lunet_fast.__file__).parent}"
    )
    yield Finding("versions", "python", "ok", system)
    for name in ("torch", "numpy"):
        yield _import("versions", name)
    if importlib.util.find_spec("triton") is None:
        fix = "pip install triton" if torch.cuda.is_available() else ""
        yield Finding("versions", "triton", "absent", "not installed; only CUDA devices use it", fix)
    else:
        yield _import("versions", "triton")


def _import(section: str, name: str) -> Finding:
    """Imports the package: one whose compiled parts do not fit is installed all the same."""
    try:
        importlib.import_module(_MODULES.get(name, name))
    except Exception as error:  # whatever a package's own code raises
        return Finding(section, name, "broken", _told(error), f"pip install --force-reinstall {name}")
    return Finding(section, name, "ok", _version(name))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _extras() -> Iterator[Finding]:
    for extra, names in EXTRAS.items():
        missing = [name for name in names if importlib.util.find_spec(_MODULES.get(name, name)) is None]
        there = [name for name in names if name not in missing]
        # The others take seconds to import, and only benchmarks and baselines need them.
        found = [_import("extras", name) for name in there] if extra in ("train", "parquet") else []
        yield from (finding for finding in found if finding.state == "broken")
        if missing:
            text, fix = f"without {', '.join(missing)}", f"pip install 'lunet-fast[{extra}]'"
            yield Finding("extras", extra, "absent", text, fix)
        else:
            yield Finding("extras", extra, "ok", ", ".join(f"{name} {_version(name)}" for name in there))


# Devices ----------------------------------------------------------------------------------------------------


def _devices() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        "devices", "cpu", "ok", f"PyTorch uses {torch.get_num_threads()} threads, {usable} cores usable"
    )
    for index in range(torch.cuda.device_count()):
        yield _guarded("devices", f"cuda:{index}", partial(_cuda, index))
    if not torch.cuda.device_count():
        built = (
            "PyTorch's build is without CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        )
        yield Finding("devices", "cuda", "absent", f"no device ({built})")
    for device in _places():
        runs = "Triton" if dispatch.runs_triton(torch.ones(1, device=device)) else "PyTorch"
        text = f"{lunet_fast.get_backend()}: tensors on {device} are computed by {runs}"
        yield Finding("devices", "backend", "ok", text)


def _cuda(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    memory = found.total_memory / 2**30
    return (
        f"{found.name}, capability {found.major}.{found.minor}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    )


def _places() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", n) for n in range(torch.cuda.device_count()))]


# The layers -------------------------------------------------------------------------------------------------


def _checks() -> Iterator[Finding]:
    yield _guarded("check", "inverse, float64", _check_inverse)
    yield _guarded("check", "log|det J|, float64", _check_logabsdet)
    for device in _places():
        name = f"float32 on {device}"
        yield _guarded("check", name, partial(_check_single, device))


def _net() -> LUNet:
    """A float64 net away from the identity, the same one each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = LUNet(16, layers=3, dtype=torch.float64)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net.requires_grad_(False)


def _rows() -> Tensor:
    return torch.linspace(-3, 3, 32 * 16, dtype=torch.float64).view(16, 32).T.contiguous()


def _check_inverse() -> str:
    net, x = _net(), _rows()
    return _small(float((net.inverse(net(x)) - x).abs().max()), _EXACT)


def _check_logabsdet() -> str:
    """Against the determinant of the Jacobian that differentiation gives, row by row."""
    net, x = _net(), _rows()
    jacobian = torch.stack([torch.func.jacrev(net)(row) for row in x])
    error = net.forward_and_logabsdet(x)[1] - torch.linalg.slogdet(jacobian)[1]
    return _small(float(error.abs().max()), _EXACT)


def _check_single(device: torch.device) -> str:
    """float32 on the device, by the backend in force, against float64: y, its log-determinant and back."""
    net, x = _net(), _rows()
    y, logabsdet = net.forward_and_logabsdet(x)
    single = _net().to(device, torch.float32)
    found = single.forward_and_logabsdet(x.to(device, torch.float32))
    back = single.inverse(found[0])
    pairs = zip((*found, back), (y, logabsdet, x), strict=True)
    return _small(max(float((a.double().cpu() - b).abs().max()) for a, b in pairs), _SINGLE)


def _small(error: float, limit: float) -> str:
    if not error <= limit:  # NaN is not small
        raise ArithmeticError(f"the largest error is {error:.1e}, and {limit:.0e} is allowed")
    return f"largest error {error:.1e}"


def _guarded(section: str, name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(section, name, "ok", look())
    except Exception as error:  # whatever a driver or a compiler raises: it is the finding
        return Finding(section, name, "broken", _told(error), _FIX_LAYERS)


def _told(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


# Data -------------------------------------------------------------------------------------------------------


class Copy(NamedTuple):
    """A data set on this machine: its files, read and checked, or None with the reasons why not."""

    located: Located | None
    damaged: bool
    """Whether some file of the data set is there but cannot be used."""
    reasons: str


def find_movielens(name: str, data_dir: Path | None = None) -> Copy:
    """The data set ``name`` in ``data_dir``, or else in ``$LUNET_FAST_DATA`` and the cache.

    The places of ``movielens.locate`` on this machine, in its order; nothing is fetched and nothing removed.
    Reads and checks the files, at most some seconds for ML-1M.
    """
    from lunet_fast.recsys.data import movielens

    spec, cache = movielens.DATASETS[name], cache_folder()
    given = os.environ.get(DATA_VARIABLE, "")
    folders = [data_dir] if data_dir is not None else [*([Path(given)] if given else []), cache]
    reasons, damaged = [], False
    for folder in folders:
        try:
            return Copy(movielens.locate(name, folder), damaged, "")
        except movielens.DataNotFoundError as error:
            reasons += [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")]
            places = (spec.zip, f"{name}/{spec.zip}", spec.ratings, f"{name}/{spec.ratings}")
            damaged |= any((folder / place).is_file() for place in (*places, f"{name}/{name}/{spec.ratings}"))
    wheel = None if spec.wheel is None or data_dir is not None else cache / spec.wheel.file
    if spec.wheel is not None and wheel is not None and wheel.is_file():
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        # A file that is not the wheel would be removed, and fetched anew.
        if digest == spec.wheel.sha256:
            return Copy(movielens.locate(name), damaged, "")
        damaged = True
        reasons.append(f"{wheel}: its SHA-256 is {digest}, expected {spec.wheel.sha256}")
    return Copy(None, damaged, "; ".join(reasons))


def _data() -> Iterator[Finding]:
    if importlib.util.find_spec("pandas") is None:
        text = "looked for with the extra [train] alone"
        yield Finding("data", "movielens", "absent", text, "pip install 'lunet-fast[train]'")
        return
    try:
        from lunet_fast.recsys.data import movielens
    except Exception as error:  # pandas' own, which is among the extras
        yield Finding("data", "movielens", "broken", _told(error))
        return
    for name in movielens.DATASETS:
        try:
            copy = find_movielens(name)
        except OSError as error:  # a folder that may not be read
            yield Finding("data", name, "broken", _told(error))
            continue
        if copy.located is not None:
            yield Finding("data", name, "ok", copy.located.source)
        elif copy.damaged:
            yield Finding("data", name, "broken", copy.reasons, "remove the file, or put a whole one there")
        else:
            text = "not on this machine; training on it fetches it"
            yield Finding("data", name, "absent", text, f"lunet-fast data fetch {name}")
    yield _cache(cache_folder(), CACHE_VARIABLE)


def _cache(folder: Path, variable: str) -> Finding:
    # Where it is not there yet, the folder that it would be made in decides.
    existing = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(
            "data", "cache", "broken", _told(error), f"set {variable} to a folder that can be written"
        )
    state = "can be written" if existing == folder else "can be made"
    return Finding("data", "cache", "ok", f"{folder} {state}")

"""Model files from elsewhere: refused with the reason or read exactly, and nothing in them is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lunet_fast import LUNetRecommender
from lunet_fast.recsys.data.ratings import from_frame
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.model_files import TrainedModel, load_model, save_model
from lunet_fast.recsys.model.schema import HEADERS, MODEL_FORMAT
from lunet_fast.recsys.model.training import train
from lunet_fast.training import files, schema
from lunet_fast.training.files import CheckpointError
from tests.fixtures import make
from tests.recsys.synthetic import latent_frame, quick_config
from tests.training.changes import Change, added, config, head, lacking, tensor

FIXTURES = Path(__file__).parents[2] / "fixtures"
VERSIONS = sorted(folder.name for folder in FIXTURES.glob("v*"))


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    """Text ids, titles, and loss ``ordinal``: every kind of tensor there is but side features."""
    import pandas as pd

    ratings = from_frame(latent_frame(9, 7, 40, text_ids=True), scale=(1, 5))
    config = quick_config(epochs=1, mlp=False, split="none", loss="ordinal", embedding_size=2)
    model = train(ratings, config).trained.model
    info = pd.DataFrame({"title": [f"Título {i}" for i in range(ratings.n_items)]})
    return TrainedModel(model, ratings.users, ratings.items, ratings.scale, info)


@pytest.fixture(scope="module")
def written(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("good") / "model.safetensors"
    save_model(file, trained)
    return file.read_bytes()


def contents(data: bytes, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file, by the package safetensors alone."""
    file = folder / "contents.safetensors"
    file.write_bytes(data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lunet_fast"])
    return load_file(file), header


def pack(file: Path, tensors: dict[str, Tensor], header: dict[str, Any], *, digested: bool = True) -> None:
    """A file with these contents, by the package safetensors, with the digest that belongs to them."""
    header = {name: value for name, value in header.items() if name != "sha256"}
    if digested:
        header["sha256"] = files.digest(tensors, header)
    save_file(tensors, file, metadata={"lunet_fast": json.dumps(header)})


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.mark}'",))


def refusal(file: Path) -> str:
    """Why the model file is refused; by both ways to load it, and quickly."""
    with pytest.raises(CheckpointError) as caught:
        load_model(file)
    message = str(caught.value)
    assert str(file) in message, "the message does not name the file"
    assert len(message) < 1000
    if file.name == "model.safetensors" and file.is_file():
        with pytest.raises(CheckpointError):
            LUNetRecommender.load(file.parent)
    return message


# Files that are no safetensors ------------------------------------------------------------------------------


def with_length(data: bytes, length: int) -> bytes:
    return length.to_bytes(8, "little") + data[8:]


def raw_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], size: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}


RAW: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "of 0 bytes, it has no header"),
    "seven bytes": (lambda data: data[:7], "of 7 bytes, it has no header"),
    "cut in the header": (lambda data: data[:100], "of 100 bytes, it claims a header of"),
    "cut in the tensors": (lambda data: data[:-20], "not a whole safetensors file"),
    "one byte short": (lambda data: data[:-1], "not a whole safetensors file"),
    "one byte more": (lambda data: data + b"\0", "not a whole safetensors file"),
    "twice": (lambda data: data + data, "not a whole safetensors file"),
    "absurd header": (lambda data: with_length(data, 2**63), "claims a header of 9223372036854775808 bytes"),
    "largest header": (lambda data: with_length(data, 2**64 - 1), "claims a header of"),
    "no header": (lambda data: with_length(data, 0), "not a whole safetensors file"),
    "header is a list": (lambda data: raw_header([]), "is not a lunet-fast model file"),
    "header is deep": (lambda data: raw_header(b"[" * 300_000), "not a whole safetensors file"),
    "header in latin-1": (lambda data: raw_header('{"é": 1}'.encode("latin-1")), "not a whole safetensors"),
    "terabytes": (
        lambda data: raw_header({**metadata(data), "model.weight": entry([2**40], 2**42)}),
        "not a whole safetensors file",
    ),
    "more than there are integers": (
        lambda data: raw_header({**metadata(data), "model.weight": entry([2**40, 2**40], 4)}, b"abcd"),
        "not a whole safetensors file",
    ),
    "another length than its shape": (
        lambda data: raw_header({**metadata(data), "model.weight": entry([3], 4)}, b"abcd"),
        "not a whole safetensors file",
    ),
    "a type unknown": (
        lambda data: raw_header(
            {**metadata(data), "a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"a"
        ),
        "not a whole safetensors file",
    ),
    "text": (lambda data: b"user,item,rating\nann,dune,5\n", "claims a header of"),
    "json": (lambda data: b'{"format": "lunet-fast model", "version": 2}', "claims a header of"),
    "gzip": (lambda data: b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + data, "claims a header of"),
}


def metadata(data: bytes) -> dict[str, Any]:
    """The header of a good file without its tensors."""
    length = int.from_bytes(data[:8], "little")
    return {"__metadata__": json.loads(data[8 : 8 + length])["__metadata__"]}


@pytest.mark.parametrize("kind", RAW)
def test_what_is_no_safetensors(kind: str, written: bytes, tmp_path: Path) -> None:
    change, reason = RAW[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(change(written))
    assert reason in refusal(file)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_by_that_name_is_not_executed(protocol: int, tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "model.safetensors"
    data = pickle.dumps(Payload(mark), protocol)
    file.write_bytes(data)
    assert (
        "a pickle" in refusal(file) or protocol < 2
    )  # the older ones are text, and have no mark of their own
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists(), "the payload does nothing, so the test says nothing"


@pytest.mark.parametrize("old", [False, True])
def test_a_file_of_torch_save_is_not_executed(old: bool, tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "model.safetensors"
    torch.save({"model": Payload(mark)}, file, _use_new_zipfile_serialization=not old)
    assert ("a pickle" if old else "a zip file, such as torch.save writes") in refusal(file)
    assert not mark.exists()
    torch.load(io.BytesIO(file.read_bytes()), weights_only=False)
    assert mark.exists()


def test_a_pickle_among_the_tensors_stays_bytes(written: bytes, tmp_path: Path) -> None:
    """Nor where a well-formed file holds one in place of ids."""
    mark, file = tmp_path / "executed", tmp_path / "model.safetensors"
    tensors, header = contents(written, tmp_path)
    payload = pickle.dumps(Payload(mark))
    tensors["users.ids.text"] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    tensors["users.ids.offsets"] = torch.tensor([0, *[len(payload)] * len(load_ids(written, tmp_path))])
    pack(file, tensors, header)
    refusal(file)
    assert not mark.exists()


def load_ids(written: bytes, folder: Path) -> list[str]:
    file = folder / "good.safetensors"
    file.write_bytes(written)
    return [str(user) for user in load_model(file).users.ids]


def test_a_zip(written: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.safetensors", written)
    assert "a zip file" in refusal(file)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "a folder, where a file is wanted" in refusal(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")  # which has no writer: to open it would wait forever
    assert "a pipe, socket or device, where a file is wanted" in refusal(tmp_path / "pipe")
    assert "a pipe, socket or device" in refusal(Path("/dev/zero"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises((CheckpointError, OSError), match="socket"):
            load_model(tmp_path / "socket")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for missing in ("link", "nothing"):
        with pytest.raises(FileNotFoundError, match=f"{missing}: no such file"):
            load_model(tmp_path / missing)


def test_a_sparse_file_of_a_terabyte_is_refused_unread(written: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(with_length(written, 2**40))
    try:
        os.truncate(file, 2**41)
    except OSError:
        pytest.skip("this file system has no sparse files of that size")
    assert "claims a header of" in refusal(file)


# safetensors with the wrong contents ------------------------------------------------------------------------


def holding(place: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(given: Tensor) -> Tensor:
        given = given.clone()
        given.view(-1)[place] = value
        return given

    return change


WRONG: dict[str, tuple[Change, str]] = {
    "missing tensor": (lacking("model.weight"), "'weight' is missing"),
    "missing layer": (lacking("model.nets.1.layers.1.lu"), "there are 3 layers in all"),
    "missing interactions": (lacking("model.interactions.indptr"), "'interactions.indptr'"),
    "missing ids": (lacking("items.ids.text"), "'items.ids.text' is missing"),
    "missing titles": (lacking("items.title.offsets"), "'items.title.offsets' is missing"),
    "missing levels": (lacking("model.levels"), "'levels' of loss 'ordinal' is not there"),
    "extra tensor": (added("model.more", torch.ones(2)), "'more' is too many"),
    "extra outside of the model": (added("more", torch.ones(2)), "the tensor 'more' is not of a model file"),
    "ids of two kinds": (added("users.ids", torch.arange(9)), "the tensor 'users.ids.offsets' is not of"),
    "a permutation": (added("model.nets.0.layers.0.permutation", torch.arange(4)), "is too many"),
    "wrong shape": (tensor("model.weight", lambda t: t[:, 1:]), "'weight' is of shape [2, 3], not [2, 4]"),
    "transposed": (tensor("model.weight", lambda t: t.T), "'weight' is of shape [4, 2], not [2, 4]"),
    "scalar": (tensor("model.weight", lambda t: t[0, 0]), "'weight' is of shape [], not [2, 4]"),
    "empty": (tensor("model.weight", lambda t: t[:0]), "'weight' is of shape [0, 4], not [2, 4]"),
    "wrong dtype": (tensor("model.weight", Tensor.double), "dtype torch.float64, not torch.float32"),
    "half": (tensor("model.user_embedding.weight", Tensor.half), "dtype torch.float16, not torch.float32"),
    "integers": (tensor("model.mean", Tensor.long), "'mean' is of dtype torch.int64, not torch.float32"),
    "NaN": (tensor("model.weight", holding(3, float("nan"))), "'model.weight' holds NaN or infinite"),
    "infinity": (tensor("model.mean", holding(0, float("-inf"))), "'model.mean' holds NaN or infinite"),
    "no sign": (tensor("model.nets.0.layers.0.sign", holding(1, 0)), "must hold signs, 1 and -1"),
    "levels turned": (tensor("model.levels", lambda t: t.flip(0)), "ratings in ascending order"),
    "indptr falls": (tensor("model.interactions.indptr", holding(2, 99)), "are not a sparse matrix"),
    "indptr as floats": (tensor("model.interactions.indptr", Tensor.float), "are not a sparse matrix"),
    "indptr of a table": (tensor("model.interactions.indptr", lambda t: t[None]), "are not a sparse matrix"),
    "unknown item": (tensor("model.interactions.indices", holding(0, 7)), "are not a sparse matrix"),
    "negative item": (tensor("model.interactions.indices", holding(0, -1)), "are not a sparse matrix"),
    "items unsorted": (
        tensor("model.interactions.indices", lambda t: t[[1, 0, *range(2, len(t))]]),
        "are not a sparse matrix",
    ),
    "item twice": (
        tensor("model.interactions.indices", lambda t: t[[0, 0, *range(2, len(t))]]),
        "are not a sparse matrix",
    ),
    "wide indices": (tensor("model.interactions.indices", Tensor.long), "is of dtype torch.int64"),
    "offsets fall": (tensor("users.ids.offsets", holding(3, 10**9)), "does not cut users.ids.text"),
    "offsets begin late": (tensor("users.ids.offsets", holding(0, 1)), "does not cut users.ids.text"),
    "offsets end early": (tensor("users.ids.offsets", holding(-1, 5)), "does not cut users.ids.text"),
    "no offsets": (tensor("users.ids.offsets", lambda t: t[:0]), "does not cut users.ids.text"),
    "offsets as floats": (tensor("users.ids.offsets", Tensor.double), "must be torch.int64 [n]"),
    "text of integers": (tensor("users.ids.text", Tensor.int), "must be torch.uint8 [n]"),
    "ids unsorted": (tensor("users.ids.text", lambda t: t.flip(0)), ""),
    "no UTF-8": (tensor("items.title.text", holding(0, 255)), "utf-8"),
    "one id fewer": (tensor("users.ids.offsets", lambda t: t[[0, *range(2, len(t))]]), "9 users but 8 user"),
    "one title fewer": (
        tensor("items.title.offsets", lambda t: t[[0, *range(2, len(t))]]),
        "items.title has 6 texts for 7 items",
    ),
    "counts of others": (head(n_users=8), "the header has 8 users but 9 user ids are there"),
    "counts of a terabyte": (head(n_users=10**15), "1000000000000000 users but 9 user ids"),
    "future version": (head(version=3), "version 3 of the format; this release reads up to 2: update"),
    "version zero": (head(version=0), "version 0 of the format"),
    "version in words": (head(version="2"), "version '2' of the format"),
    "version as truth": (head(version=True), "version True of the format"),
    "another format": (head(format="lunet-fast checkpoint"), "is not a lunet-fast model file"),
    "no scale": (lacking("scale"), "lacks 'scale'"),
    "scale of one": (head(scale=[1.0]), "scale"),
    "scale turned": (head(scale=[5.0, 1.0]), "must be the lowest and the highest rating"),
    "scale of words": (head(scale=["low", "high"]), "scale[0]='low' must be a number"),
    "scale beyond floats": (head(scale=[1, 10**400]), "scale[1]=a number of 1329 bits must be a number"),
    "unknown key": (head(more=1), "unknown key 'more'"),
    "unknown column": (head(item_info=["title", "script"]), "is unknown: choose one of title, genres"),
    "column twice": (head(item_info=["title", "title"]), "must not repeat an entry"),
    "column of lists": (head(item_info=[["title"]]), "item_info[0]=a list is unknown: choose one of title"),
    "config of a list": (head(config=[]), "config=a list must be a JSON object"),
    "no config": (lacking("config"), "lacks 'config'"),
    "unknown setting": (config(depth=3), "unknown setting 'depth'"),
    "setting in words": (config(layers="2"), "layers='2' must be a whole number"),
    "setting as truth": (config(layers=True), "layers=True must be a whole number"),
    "other sizes": (config(embedding_size=3), "do not fit the model's settings"),
    "other layers": (config(layers=3), "members=2 and layers=3 do not fit"),
    "other members": (config(members=3), "members=3 and layers=2 do not fit"),
    "other read-out": (config(gamma=0.5), "do not fit the model's settings"),
    "other loss": (config(loss="mse"), "'levels' of loss 'ordinal' is there"),
    "no biases": (config(biases=False), "_bias' is too many"),
    "a size of terabytes": (
        config(embedding_size=10**12),
        "embedding_size=1000000000000 must be a whole number from 1 to",
    ),
    "a size beyond integers": (config(embedding_size=10**30), "must be a whole number from 1 to"),
    "a billion layers": (config(layers=10**9), "layers=1000000000 must be a whole number from 1 to 1000"),
    "a billion members": (config(members=10**9), "members=1000000000 must be a whole number from 1 to 1000"),
    "a rate beyond floats": (config(learning_rate=10**400), "learning_rate=a number of 1329 bits must be"),
    "a million threads": (config(threads=10**6), "threads=1000000 must be a whole number from 1 to 1024"),
    "a recipe of one's own": (config(recipe="mine"), "recipe='mine' is unknown"),
    "hidden layers of words": (config(mlp_hidden=["many"]), "mlp_hidden[0]='many' must be a whole number"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_contents(kind: str, written: bytes, tmp_path: Path) -> None:
    """Each with the digest that belongs to it, so that it is the contents that are refused."""
    change, reason = WRONG[kind]
    tensors, header = contents(written, tmp_path)
    file = tmp_path / "model.safetensors"
    pack(file, tensors, header)
    load_model(file)
    change(tensors, header)
    pack(file, tensors, header)
    assert reason in refusal(file)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have(number: str, written: bytes, tmp_path: Path) -> None:
    tensors, header = contents(written, tmp_path)
    text = json.dumps({**header, "scale": [0, "END"]}).replace('"END"', number)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"lunet_fast": text})
    assert ("must be a number" if number == "1e999" else "is no JSON") in refusal(file)


def test_files_of_others(tmp_path: Path) -> None:
    """safetensors of another library, and files of ours of another kind."""
    file = tmp_path / "model.safetensors"
    save_file({"model.embed_tokens.weight": torch.ones(8, 4)}, file, metadata={"format": "pt"})
    assert "this safetensors file is not a lunet-fast model file" in refusal(file)
    save_file({"weight": torch.ones(8, 4)}, file)
    assert "is not a lunet-fast model file" in refusal(file)
    files.write_tensors(file, {}, schema.CHECKPOINT_FORMAT, {"state": {}})
    assert "is not a lunet-fast model file" in refusal(file)


def test_the_digest_is_looked_at(written: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors, header = contents(written, tmp_path)
    pack(file, tensors, header, digested=False)
    assert "sha256 is missing, which files of version 2 of the format have" in refusal(file)
    save_file(tensors, file, metadata={"lunet_fast": json.dumps({**header, "sha256": "0" * 64})})
    assert "damaged" in refusal(file)
    save_file(tensors, file, metadata={"lunet_fast": json.dumps({**header, "sha256": "z"})})
    assert "sha256='z' must be a text that matches" in refusal(file)
    # A file of version 1 has none, and one that has is held to it.
    pack(file, tensors, {**header, "version": 1}, digested=False)
    load_model(file)
    save_file(tensors, file, metadata={"lunet_fast": json.dumps({**header, "version": 1})})
    assert "damaged" in refusal(file)


def test_the_digest_tells_every_part(written: bytes, tmp_path: Path) -> None:
    """Name, dtype, shape, bytes, and every value of the header."""
    tensors, header = contents(written, tmp_path)
    found = files.digest(tensors, header)
    weight = tensors["model.weight"]
    for changed in (
        {**tensors, "more": torch.ones(1)},
        {**{name: t for name, t in tensors.items() if name != "model.weight"}, "model.weights": weight},
        {**tensors, "model.weight": weight.view(torch.int32)},
        {**tensors, "model.weight": weight.reshape(-1)},
        {**tensors, "model.weight": weight.nextafter(torch.tensor(9.0))},
        {**tensors, "model.weight": -weight},
    ):
        assert files.digest(changed, header) != found
    assert files.digest(dict(reversed(tensors.items())), dict(reversed(header.items()))) == found
    for name in header:
        assert files.digest(tensors, {**header, name: "another"}) != found


# Damage -----------------------------------------------------------------------------------------------------


def same(one: TrainedModel, other: TrainedModel) -> bool:
    """Whether two models are one another's, bit for bit."""
    states = one.model.state_dict(), other.model.state_dict()
    return (
        states[0].keys() == states[1].keys()
        and all(t.dtype == states[1][name].dtype for name, t in states[0].items())
        and all(t.numpy().tobytes() == states[1][name].numpy().tobytes() for name, t in states[0].items())
        and (one.users, one.items, one.scale) == (other.users, other.items, other.scale)
        and one.model.config == other.model.config
        and (one.item_info is None) == (other.item_info is None)
        and (one.item_info is None or one.item_info.equals(other.item_info))
    )


def sections(data: bytes) -> dict[str, range]:
    """The parts of a file, each of which damage must be told in."""
    length = int.from_bytes(data[:8], "little")
    text = data.index(b"lunet_fast", 8)
    return {
        "length": range(8),
        "header": range(8, 8 + length),
        "our header": range(text, text + len(json.dumps(metadata(data)["__metadata__"]["lunet_fast"]))),
        "tensors": range(8 + length, len(data)),
    }


def check_damaged(damaged: bytes, trained: TrainedModel, file: Path) -> bool:
    """Refused, or read as it was written; whether it was refused."""
    file.write_bytes(damaged)
    try:
        read = load_model(file)
    except CheckpointError as error:
        message = str(error)
    else:
        assert same(read, trained), "a damaged file was read as another model"
        return False
    assert str(file) in message
    return True


shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@shared
@given(st.sampled_from(["length", "header", "our header", "tensors"]), st.data())
def test_a_flipped_bit_is_refused_or_changes_nothing(
    trained: TrainedModel, written: bytes, tmp_path: Path, section: str, data: st.DataObject
) -> None:
    damaged = bytearray(written)
    place = data.draw(st.sampled_from(sections(written)[section]))
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    refused = check_damaged(bytes(damaged), trained, tmp_path / "m")
    assert refused or section != "tensors"


@shared
@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), min_size=1, max_size=40))
@example([(0, 0)])
def test_overwritten_bytes_are_refused_or_change_nothing(
    trained: TrainedModel, written: bytes, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    damaged = bytearray(written)
    for place, value in changes:
        damaged[place % len(written)] = value
    check_damaged(bytes(damaged), trained, tmp_path / "m")


@shared
@given(st.integers(0, 10**9), st.binary(max_size=64), st.integers(0, 64))
def test_cut_and_joined_files_are_refused_or_change_nothing(
    trained: TrainedModel, written: bytes, tmp_path: Path, place: int, between: bytes, dropped: int
) -> None:
    place %= len(written)
    damaged = written[:place] + between + written[place + dropped :]
    check_damaged(damaged, trained, tmp_path / "m")


@pytest.mark.parametrize("section", ["length", "header", "our header", "tensors"])
def test_each_section_at_many_places(
    section: str, trained: TrainedModel, written: bytes, tmp_path: Path
) -> None:
    """Evenly over the section, whatever hypothesis looks at first; all of the length."""
    places = sections(written)[section]
    for place in places[:: max(1, len(places) // 40)]:
        damaged = bytearray(written)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        check_damaged(bytes(damaged), trained, tmp_path / "m")


@pytest.mark.slow
@pytest.mark.parametrize("bit", range(8))
def test_every_byte(bit: int, trained: TrainedModel, written: bytes, tmp_path: Path) -> None:
    for place in range(len(written)):
        damaged = bytearray(written)
        damaged[place] ^= 1 << bit
        check_damaged(bytes(damaged), trained, tmp_path / "m")


# The schema -------------------------------------------------------------------------------------------------


def test_the_schema_takes_what_is_written(written: bytes, tmp_path: Path) -> None:
    _, header = contents(written, tmp_path)
    assert schema.violation(header, HEADERS[MODEL_FORMAT]) is None
    changed = {**header, "config": TrainConfig().to_dict()}
    assert schema.violation(changed, HEADERS[MODEL_FORMAT]) is None


def test_the_schema_agrees_with_jsonschema(written: bytes, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    _, good = contents(written, tmp_path)
    published = HEADERS[MODEL_FORMAT].model_json_schema()
    jsonschema.Draft202012Validator.check_schema(published)
    for changed in (
        good,
        *({**good, name: value} for name in good for value in (None, 3, "x", [], {}, True)),
    ):
        ours = schema.violation(changed, HEADERS[MODEL_FORMAT]) is None
        assert ours == jsonschema.Draft202012Validator(published).is_valid(changed), changed


# Other files of a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JSON file"),
        (b"{", "not a JSON file"),
        (b"[1]", "holds a list, not a JSON object"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b"\xff\xfe", "not a JSON file"),
        (b'{"a": ' * 200_000, "not a JSON file"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not a JSON file"),
    ],
)
def test_json_files(data: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        files.read_json(file)
    assert str(file) in str(caught.value)
    os.truncate(file, files.MOST_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than any file of a run"):
        files.read_json(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="a pipe"):
        files.read_json(file)
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.read_json(tmp_path / "nothing")


# Files of every version -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", make.MODELS)
def test_models_of_every_version_say_what_they_said(version: str, name: str) -> None:
    folder = FIXTURES / version
    said = json.loads((folder / "expected.json").read_text(encoding="utf-8"))[name]
    found = make.answers(folder, name)
    assert found.keys() == said.keys()
    for what, values in said.items():
        if what in ("predict", "score"):
            # Another machine's matrix products round otherwise.
            assert found[what] == pytest.approx(values, rel=1e-4, abs=1e-4), what
        else:
            assert found[what] == values, what


@pytest.mark.parametrize("version", VERSIONS)
def test_trainings_of_every_version_go_on(version: str, tmp_path: Path) -> None:
    """To the end that the training had which was never interrupted."""
    folder = FIXTURES / version
    run = tmp_path / "run"
    for file in ("config.json", "checkpoints/lu-net.safetensors"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_bytes((folder / "run" / file).read_bytes())
    ratings = make.ratings("gamma1")
    model = train(ratings, make.settings(**make.TRAINING), out=run, resume=True).trained.model
    said = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["training"]
    assert model(ratings.user, ratings.item).tolist() == pytest.approx(said, abs=1e-3)
    # The checkpoint was taken up, not passed over: half of the epochs were left to train.
    losses = files.read_tensors(run / "checkpoints" / "lu-net.safetensors", schema.CHECKPOINT_FORMAT)[1][
        "state"
    ]["train_loss"]
    before = files.read_tensors(
        folder / "run" / "checkpoints" / "lu-net.safetensors", schema.CHECKPOINT_FORMAT
    )[1]["state"]["train_loss"]
    assert losses[: make.EPOCHS] == before
    assert len(losses) == make.TRAINING["epochs"]


def test_the_current_version_is_kept() -> None:
    assert f"v{schema.FORMAT_VERSION}" in VERSIONS, "make it by tests/fixtures/make.py"


def test_a_kept_model_is_damaged_and_refused(tmp_path: Path) -> None:
    file = tmp_path / "m"
    data = bytearray((FIXTURES / f"v{schema.FORMAT_VERSION}" / "gamma1.safetensors").read_bytes())
    data[-30] ^= 4
    file.write_bytes(data)
    assert "damaged" in refusal(file)


# Loading disturbs nobody ------------------------------------------------------------------------------------


def test_loading_draws_nothing_and_leaves_the_filters(written: bytes, tmp_path: Path) -> None:
    import warnings

    file = tmp_path / "m"
    file.write_bytes(written)
    torch.manual_seed(5)
    state, filters = torch.get_rng_state(), list(warnings.filters)
    load_model(file)
    assert torch.equal(torch.get_rng_state(), state)
    assert warnings.filters == filters


def test_a_loaded_model_owns_its_memory(written: bytes, trained: TrainedModel, tmp_path: Path) -> None:
    """What happens to the file afterwards does not reach it."""
    file = tmp_path / "m"
    file.write_bytes(written)
    read = load_model(file)
    with file.open("r+b") as stream:
        stream.seek(len(written) // 2)
        stream.write(b"\xff" * (len(written) // 2))
    os.truncate(file, 10)
    assert same(read, trained)
    assert all(parameter.requires_grad for parameter in read.model.parameters())

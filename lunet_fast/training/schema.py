"""What settings and files may hold, declared once and checked by pydantic before anything is built from it.

:class:`Settings` is the base of configurations, :class:`Header` that of the headers of files: types, bounds
and choices of a field are its annotation, its docstring is its description, and both are in its JSON Schema.

A file of :mod:`~lunet_fast.training.files` is safetensors: eight bytes with the length of a JSON object, that
object (names, dtypes, shapes and places of the tensors), the tensors. Under ``__metadata__`` it has the one
key ``lunet_fast``, a string of JSON: the *header*.

Version 2 of the format has ``sha256`` in the header: the digest of the rest of the header, as JSON with
sorted keys and no white space, followed by, for each tensor in the order of their names, the JSON array
[name, dtype, shape] and the bytes. Version 1 is the same without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_FORMAT = "lunet-fast checkpoint"
FORMAT_VERSION = 2

DIGEST_FROM = 2
"""The version of the format from which ``sha256`` has to be there."""

#: true is no number and "1" neither; 1 is a float, NaN is none; an unknown name is an error.
_STRICT = ConfigDict(
    strict=True, extra="forbid", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
)

Count = Annotated[int, Field(ge=1, le=10**9)]
Threads = Annotated[int, Field(ge=1, le=1024)]
"""As many would be started, and a model file from elsewhere may ask for any number."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Settings(BaseModel):
    """Base of a configuration: immutable, equal by value.

    A value that cannot work and a name that is unknown raise ``ValueError``, which says what is allowed.
    """

    model_config = _STRICT

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_explained(error, type(self), "setting")) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked as a new one."""
        return type(self)(**{**dict(self), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, in the order of the fields."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`. Fields that are absent take their defaults."""
        if not isinstance(values, dict):
            raise ValueError(f"the settings must be a JSON object, got a {type(values).__name__}")
        return cls(**values)


class Header(BaseModel):
    """Base of the headers of one kind of file, which declares ``format``, the kind, as a ``Literal``."""

    model_config = _STRICT

    version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = ""


Schema = type[Header]


class TrainingState(Settings):
    """How far a phase of a training is: after ``step`` steps of epoch ``epoch``."""

    phase: str
    epoch: Annotated[int, Field(ge=0, le=10**9)]
    step: Annotated[int, Field(ge=0, le=10**12)] = 0
    """Version 1 had checkpoints at the ends of epochs alone."""
    spent: NotNegative = 0.0
    """Seconds of this epoch before the checkpoint."""
    train_loss: list[float]
    """The error of each epoch that is done."""
    test_loss: list[float]
    """The same on the test part, empty without one."""
    elapsed: list[NotNegative]
    """Seconds up to the end of each epoch."""


class CheckpointHeader(Header):
    """An interrupted training: how far it is."""

    format: Literal["lunet-fast checkpoint"]
    state: TrainingState


def violation(header: Any, schema: Schema) -> str | None:
    """What is wrong with a header, or None: the place, the value and what it must be."""
    try:
        schema.model_validate(header)
    except ValidationError as error:
        return _explained(error, schema, "key")
    return None


def check_same_tensors(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """``ValueError`` unless the two have the same names, dtypes and shapes."""
    fit = "do not fit the model's settings"
    for name in sorted(wanted.keys() - state.keys()):
        raise ValueError(f"the saved tensors {fit}: {name!r} is missing")
    for name in sorted(state.keys() - wanted.keys()):
        raise ValueError(f"the saved tensors {fit}: {name!r} is too many")
    for name, tensor in wanted.items():
        for what in ("dtype", "shape"):
            ours, theirs = getattr(tensor, what), getattr(state[name], what)
            if ours != theirs:
                ours, theirs = (str(list(v) if what == "shape" else v) for v in (ours, theirs))
                raise ValueError(f"the saved tensors {fit}: {name!r} is of {what} {theirs}, not {ours}")


# Messages ---------------------------------------------------------------------------------------------------


def _explained(error: ValidationError, model: type[BaseModel], noun: str) -> str:
    """The first of the errors in a line: name, value and what is allowed."""
    first = error.errors(include_url=False)[0]
    kind, path = first["type"], first["loc"]
    if kind == "value_error":  # of a check of ours, whose message says it all
        return str(first["ctx"]["error"])
    if not path:
        return f"must be a JSON object, got {shown(first['input'])}"
    name, *inner = path
    if kind == "extra_forbidden":
        return f"unknown {noun} {shown(name)}: the {noun}s are {', '.join(model.model_fields)}"
    if kind == "missing":
        return f"lacks {name!r}"
    part = model.model_json_schema()["properties"][name]
    for _ in inner:
        part = part["items"]
    place = str(name) + "".join(f"[{index}]" for index in inner)
    return f"{place}={shown(first['input'])} {_refusal(part)}"


_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "array": "a list",
    "object": "a JSON object",
}


def _refusal(part: Mapping[str, Any]) -> str:
    """What a field must be, from its JSON Schema."""
    if "anyOf" in part:
        part, *_ = (each for each in part["anyOf"] if each.get("type") != "null")
        return f"{_refusal(part)}, or null"
    if "enum" in part or "const" in part:
        return f"is unknown: choose one of {', '.join(part.get('enum', [part.get('const')]))}"
    words = _KINDS[part.get("type", "object")]
    if "pattern" in part:
        return f"must be {words} that matches {part['pattern']}"
    least, most = part.get("minItems"), part.get("maxItems")
    if least is not None:
        return f"must be {words} of {least} entries" + ("" if least == most else " or more")
    low, high = part.get("minimum"), part.get("maximum")
    above, below = part.get("exclusiveMinimum"), part.get("exclusiveMaximum")
    if low is not None and low == high:
        return f"must be {low}"
    if low is not None and high is not None:
        return f"must be {words} from {low} to {high}"
    if above is not None and below is not None:
        return f"must be {words} between {above} and {below}, both excluded"
    ends = {"of at least": low, "above": above, "of at most": high, "below": below}
    limits = " and ".join(f"{end} {n}" for end, n in ends.items() if n is not None)
    return f"must be {words} {limits}".rstrip()


def shown(value: Any, limit: int = 60) -> str:
    """The value for a message, cut where it is long: what is refused may be of any size."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def one_line(text: str, limit: int = 2500) -> str:
    """The text in one line without control characters, cut where it is long."""
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split())
    )
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

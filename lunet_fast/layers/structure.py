"""The structure of an LU layer, signs and a permutation: buffers that no averaging can change.

Whatever runs over ``buffers()`` reaches them: exponential means of the weights, means of several nets. A
mean of whole numbers is cut to a whole number, and what was a permutation is none any more, without a word.
But the buffers must stay buffers, since broadcasts, checkpoints and exports look for them there. So a layer
has a structure of its own beside them, and what is written to a buffer becomes its own only if it is one;
roundings of its own are put right, and anything else raises when the layer is next used.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast.layers.arguments import check_tensor
from lunet_fast.layers.cached import Keeping

#: How far a sign, or an entry of a permutation given as floats, may be from a whole number: averages of equal
#: numbers are off by their rounding.
WHOLE = 1e-2

_MEAN = (
    "; if it is a mean of several layers', average nets of one structure, as copies of one net are and nets "
    "with the same structure_seed, or average their parameters alone"
)


class StructuredLayer(Keeping):
    """A module with the buffers ``sign`` [D] and ``permutation`` [D] or None, D its ``in_features``.

    A read compares PyTorch's count of writes to the buffers; only where one was written to are its numbers
    looked at, which waits for the device.
    """

    in_features: int
    lu: nn.Parameter

    # The buffers that were last found sound, with PyTorch's counts of writes to them.
    _seen: tuple[Tensor, int, Tensor | None, int] | None = None

    @property
    def sign(self) -> Tensor:
        """The signs [D] of u_ii, ±1 in the dtype of ``lu``."""
        return self._structure()[0]

    @sign.setter
    def sign(self, value: Tensor) -> None:  # for type checkers: nn.Module sets a buffer without asking here
        self._buffers["sign"] = value

    @property
    def permutation(self) -> Tensor | None:
        """The rows of P, (P A)[i] = A[permutation[i]], [D] int64, or None."""
        return self._structure()[1]

    @permutation.setter
    def permutation(self, value: Tensor | None) -> None:  # as above
        self._buffers["permutation"] = value

    def _make_structure(
        self, device: torch.device | str | None, dtype: torch.dtype | None, permutation: Tensor | None
    ) -> None:
        """Make the buffers, with signs of 1. Raises as ``checked_permutation``."""
        features = self.in_features
        # The properties of these names read the buffers, so register_buffer would find the names taken.
        self._buffers["sign"] = sign = torch.ones(features, device=device, dtype=dtype)
        self._buffers["permutation"] = None
        # The structure itself: never on the meta device, and nothing that averages finds it. (Not by
        # torch.ones, of which accelerate's init_empty_weights has another that heeds no device.)
        real = torch.device("cpu") if sign.is_meta else sign.device
        self._own_sign = torch.tensor(1.0, device=real, dtype=dtype).repeat(features)
        self._own_permutation: Tensor | None = None
        if permutation is not None:
            check_tensor("permutation", permutation)
            order = checked_permutation(permutation, features).detach()
            self._buffers["permutation"] = order.to(sign.device, copy=True)
            self._own_permutation = None if order.is_meta else order.to(real, copy=True)

    def _reset_structure(self, sign: Tensor | None) -> None:
        """Take these signs, all 1 if None. A permutation stays; where its buffer holds none, as new memory
        does, it is the layer's own."""
        with suppress(ValueError):
            self._check_structure()
        own = self._own_sign
        self._own_sign = torch.ones_like(own) if sign is None else sign.to(own)
        self._restore_structure()

    def _structure(self) -> tuple[Tensor, Tensor | None]:
        """(sign, permutation) to compute with: the buffers, looked at where they were written to."""
        sign, permutation = self._buffers["sign"], self._buffers["permutation"]
        assert sign is not None
        if torch.compiler.is_compiling():
            # Here nothing can be raised. What is exported, nobody averages any more. (Dynamo of PyTorch 2.11
            # takes every compilation for an export.)
            if not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
                return sign, permutation
            return _signs_or(sign, self._own_sign), _order_or(permutation, self._own_permutation)
        seen = self._seen
        if (
            seen is None
            or sign is not seen[0]
            or permutation is not seen[2]
            or _version(sign) != seen[1]
            or (permutation is not None and _version(permutation) != seen[3])
        ):
            self._check_structure()
            sign, permutation = self._buffers["sign"], self._buffers["permutation"]
            assert sign is not None
        return sign, permutation

    def _check_structure(self) -> None:
        """Take over what was written to the buffers, or put them right, or raise ``ValueError``.

        Waits for the device.
        """
        sign, permutation = self._buffers["sign"], self._buffers["permutation"]
        assert sign is not None
        if not _is_readable(sign) or not (permutation is None or _is_readable(permutation)):
            return
        own = self._own_sign.to(sign.device, sign.dtype)
        if not torch.equal(sign, own):
            if sign.shape == own.shape and bool(((sign - own).abs() <= WHOLE).all()):
                _overwrite(sign, own)
            elif sign.shape == own.shape and bool((sign.abs() == 1).all()):
                self._own_sign = sign.detach().clone()
            else:
                wanted = f"sign must hold {self.in_features} signs, 1 and -1"
                raise ValueError(f"{wanted}, got {sign.tolist()}{_MEAN}")
        if permutation is None:
            self._own_permutation = None
        else:
            self._check_permutation(permutation)
        self._look()

    def _check_permutation(self, permutation: Tensor) -> None:
        own = self._own_permutation
        if own is not None:
            own = own.to(permutation.device)
            if permutation.dtype == own.dtype and torch.equal(permutation, own):
                return
        try:
            order = checked_permutation(permutation, self.in_features)
        except ValueError as error:
            # A mean of whole numbers may lose one, and more where float32 rounds large ones.
            least = 1 + self.in_features // 100
            if own is None or own.shape != permutation.shape or int((permutation - own).abs().max()) > least:
                raise ValueError(f"{error}{_MEAN}") from None
            order = own
        self._own_permutation = order.clone()
        if permutation.dtype != order.dtype:
            self._buffers["permutation"] = order.clone()
        else:
            _overwrite(permutation, order)

    def _restore_structure(self) -> None:
        """Write the layer's own structure to its buffers, whatever they hold."""
        sign, permutation = self._buffers["sign"], self._buffers["permutation"]
        assert sign is not None
        if type(sign) is not Tensor or _is_wrapped(sign):
            return
        if not sign.is_meta:
            self._own_sign = self._own_sign.to(sign.device, sign.dtype)
            _overwrite(sign, self._own_sign)
        own = self._own_permutation
        if own is not None and permutation is not None and not permutation.is_meta:
            self._own_permutation = own = own.to(permutation.device)
            if permutation.dtype != own.dtype or permutation.shape != own.shape:
                self._buffers["permutation"] = own.clone()
            else:
                _overwrite(permutation, own)
        self._look()

    def _look(self) -> None:
        sign, permutation = self._buffers["sign"], self._buffers["permutation"]
        assert sign is not None
        if not sign.is_meta:
            count = -1 if permutation is None else _version(permutation)
            self._seen = (sign, _version(sign), permutation, count)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Here also what PyTorch does not count as a write, as dist.broadcast, is taken over. to_empty gives
        # memory with nothing in it.
        self._check_structure()
        super()._apply(fn, recurse=recurse)
        self._restore_structure()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = None  # a copy counts its writes anew
        if "_own_sign" not in self.__dict__:  # pickled before there was one
            self._own_sign = torch.ones_like(state["_buffers"]["sign"])
            self._own_permutation = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        missing_keys, error_msgs = args[2], args[4]
        before = len(error_msgs)
        wrong = []
        given = state_dict.get(prefix + "sign")
        if given is not None and given.shape == (self.in_features,) and _is_readable(given):
            sign = given.sign()
            if not bool(((given - sign).abs() <= WHOLE).all()) or not bool(sign.all()):
                wrong.append("sign")
                error_msgs.append(
                    f"{prefix}sign must hold {self.in_features} signs, 1 and -1, got {given.tolist()}{_MEAN}"
                )
            elif not torch.equal(sign, given):
                state_dict = {**state_dict, prefix + "sign": sign}
        # P is there only for layers that have one, so a whole layer's state may bring one or take it away.
        given = state_dict.get(prefix + "permutation")
        if given is not None:
            try:
                order = checked_permutation(given, self.in_features)
            except ValueError as error:
                wrong.append("permutation")
                error_msgs.append(f"{prefix}permutation: {error}{_MEAN}")
            else:
                self._buffers["permutation"] = order.to(self.lu.device, copy=True)
                if order is not given:
                    state_dict = {**state_dict, prefix + "permutation": order}
        elif prefix + "lu" in state_dict:
            self._buffers["permutation"] = None
        for name in wrong:
            state_dict = {k: v for k, v in state_dict.items() if k != prefix + name}
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in wrong:
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)
        if len(error_msgs) == before:
            self._check_structure()

    def _save_to_state_dict(self, *args: Any, **options: Any) -> None:
        self._check_structure()
        super()._save_to_state_dict(*args, **options)


def checked_permutation(permutation: Tensor, features: int) -> Tensor:
    """``permutation`` [D] as int64, from whole numbers of any dtype; ``ValueError`` where it is none."""
    if permutation.shape != (features,) or permutation.is_complex() or permutation.dtype == torch.bool:
        raise ValueError(
            f"permutation must be {features} integers, got {permutation.dtype} of shape "
            f"{tuple(permutation.shape)}"
        )
    if not _is_readable(permutation):
        return permutation.to(torch.int64)
    whole = permutation.round() if permutation.is_floating_point() else permutation
    # As a mean of state dicts with one permutation comes out; of different ones, it is refused.
    near = whole is permutation or bool(((permutation - whole).abs() <= WHOLE).all())
    expected = torch.arange(features, device=permutation.device)
    if not near or not bool((whole.sort().values == expected).all()):
        raise ValueError(f"permutation must hold each of 0..{features - 1} once, got {permutation.tolist()}")
    return whole.to(torch.int64)


def _overwrite(buffer: Tensor, value: Tensor) -> None:
    if not torch.equal(buffer, value):  # an inference tensor may not be written to
        with torch.no_grad():
            buffer.copy_(value)


def _is_wrapped(tensor: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_readable(tensor: Tensor) -> bool:
    """Whether it is a plain tensor with numbers."""
    return type(tensor) is Tensor and not tensor.is_meta and not _is_wrapped(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _signs_or(sign: Tensor, own: Tensor) -> Tensor:
    """``sign`` where it is ±1, ``own`` elsewhere, by operations that can be traced."""
    return torch.where(sign.abs() == 1, sign, own.to(sign.device, sign.dtype))


def _order_or(permutation: Tensor | None, own: Tensor | None) -> Tensor | None:
    """``permutation`` if it is one, else ``own``, by operations that can be traced."""
    if permutation is None or own is None:
        return permutation
    expected = torch.arange(permutation.shape[-1], device=permutation.device)
    is_one = (permutation.sort().values == expected).all()
    return torch.where(is_one, permutation, own.to(permutation.device))

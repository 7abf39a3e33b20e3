"""ProjectionPlan: project_out of hundreds of tensors in place, as one grouped call per device.

One small product after the other leaves a machine idle: a LoRA matrix of rank 16 has 16 fibres, and its basis, not
the matrix, is most of what must be read. The plan looks at everything that stays the same once (shapes, strides,
overlaps, orthonormality, which tensors share a basis), so that a call is one operator per device and back-end: a
shared basis is then read once for all of its tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, requested_backend
from ..checks import compute_dtype, describe
from .basis_checks import check_orthonormal, check_projection, check_strength, version
from .library import without_autocast
from .overlaps import check_no_overlaps, check_writable
from .project_out import against_coefficients, pick_projection

OP = "ProjectionPlan"
_COUNT = operator.attrgetter("_version")


@dataclass
class _Basis:
    """A basis as given, what of it was checked (`_seen`), and its form for the kernels: compute dtype, contiguous."""

    source: Tensor
    name: str
    checked: tuple[int | None, int]
    ready: Tensor
    held: Tensor  # the numbers of `checked`: while they are held no others can come to lie at their address


@dataclass
class _Direction:
    """U^T v [r] of a direction v and a basis, and what of both it was computed from (`_seen`)."""

    source: Tensor
    basis: int
    versions: tuple[int | None, ...]
    ready: Tensor
    held: Tensor  # as above


@dataclass(frozen=True)
class _Entry:
    tensor: Tensor
    dim: int
    basis: int
    direction: int  # -1: none


class ProjectionPlan:
    """Takes the component along a subspace out of many tensors, in place, as one grouped call per device.

    Equivalent to::

        for (tensor, basis, dim), direction in zip(entries, only_against or [None] * len(entries)):
            tensor.copy_(rk.project_out(tensor, basis, dim, strength, only_against=direction))

    The plan holds the tensors it is given: `apply_` sees every later in-place change of them, and a parameter whose
    `.data` was replaced by a tensor of the same shape, dtype and device. A `.grad` that is set to None and created
    anew is another tensor; build the plan anew then, or keep it (`zero_grad(set_to_none=False)`). Bases and directions
    are held as well. One that was changed in place, or given other data, is looked at again,
    bases measured included; a write past torch's version counter (`basis.data.copy_`, `basis.numpy()[:] = ...`) is not
    seen. deepcopy and pickle work.

    Args:
        entries: (tensor, basis, dim) each. tensor: any shape of at least one dimension, any strides in which every
            element has its own place, fp32, bf16, fp16 (fp64 on the reference and CPU back-ends), any device; leaf
            parameters are fine, as `apply_` runs without gradients. basis: [tensor.shape[dim], r] with orthonormal
            columns on the same device. Entries that give the same basis share it: it is checked once and, on the CPU,
            read once for all of them. dim may be negative. Empty tensors and r = 0 are allowed.
        strength: in [0, 1], for all entries.
        only_against: None, or one direction [tensor.shape[dim]] or None per entry, as in `project_out`.
        backend: "reference", "cpu", "triton", "cuda", "auto", or None for the choice of `use_backend` / environment in
            force when `apply_` is called.

    Raises:
        ValueError: an entry has a wrong shape, dtype or device, cannot be written to element by element (expanded), a
            basis is not orthonormal, or two entries share memory; the message names the entries by index.
        TypeError: an argument is not of the kind described.
    """

    def __init__(
        self,
        entries: Sequence[tuple[Tensor, Tensor, int]],
        strength: float = 1.0,
        *,
        only_against: Sequence[Tensor | None] | None = None,
        backend: str | None = None,
    ) -> None:
        self.strength = check_strength(OP, strength)
        self._backend = requested_backend(backend) if backend is not None else None
        self._bases: list[_Basis] = []
        self._directions: list[_Direction] = []
        self._entries: list[_Entry] = []
        self._basis_index: dict[Any, int] = {}
        self._direction_index: dict[Any, int] = {}
        listed = _listed(entries)
        directions = _directions(only_against, len(listed))
        for i, ((tensor, basis, dim), direction) in enumerate(zip(listed, directions, strict=True)):
            self._add(i, tensor, basis, dim, direction)
        check_no_overlaps(
            OP,
            {f"entries[{i}]": e.tensor for i, e in enumerate(self._entries)},
            {b.name: b.source for b in self._bases},
        )
        self._tensors = [e.tensor for e in self._entries]
        self._look()
        self._look_at_sources()
        self._prepared: tuple[Any, list[tuple[torch.device, Callable[[], None]]]] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # which has addresses in it

    def __repr__(self) -> str:
        numbers = sum(e.tensor.numel() for e in self._entries)
        return (
            f"ProjectionPlan({len(self)} tensors, {len(self._bases)} bases, {numbers} numbers, "
            f"strength={self.strength:g})"
        )

    @torch._disable_dynamo  # it keeps and compares addresses
    @torch.no_grad()
    def apply_(self) -> None:
        """Projects every tensor in place.

        Raises ValueError when a basis was changed and is no longer orthonormal, or a tensor was given other storage
        of another shape, and BackendError when an explicitly requested back-end cannot run an entry; nothing is
        changed then. On a GPU it does not wait for the device unless a basis was changed. Under torch.compile it is
        a graph break.
        """
        requested = self._backend or requested_backend(None)
        self._refresh()
        chosen = {kind: pick_projection(tensor, requested) for kind, tensor in self._kinds.items()}
        choice = tuple(backend.name for backend in chosen.values())
        if self._prepared is None or self._prepared[0] != choice:
            self._prepared = choice, self._prepare(chosen)
        for device, run in self._prepared[1]:
            with without_autocast(device.type):
                run()
        if self._versioned:
            torch.autograd.graph.increment_version(self._versioned)

    def _add(self, i: int, tensor: Any, basis: Any, dim: Any, direction: Any) -> None:
        prefix = f"entries[{i}] "
        dim = check_projection(OP, tensor, basis, dim, direction, prefix)
        check_writable(OP, f"{prefix}tensor", tensor)
        dtype = compute_dtype(tensor.dtype)
        at = self._basis(f"{prefix}basis", basis, dtype)
        self._entries.append(_Entry(tensor, dim, at, -1 if direction is None else self._direction(direction, at)))

    def _basis(self, name: str, basis: Tensor, dtype: torch.dtype) -> int:
        key = (*_place(basis), basis.dtype, basis.device, dtype, id(basis) if basis.numel() == 0 else 0)
        if key not in self._basis_index:
            check_orthonormal(OP, name, basis)
            ready = basis.detach().to(dtype).contiguous()
            self._basis_index[key] = len(self._bases)
            self._bases.append(_Basis(basis, name, _seen(basis), ready, basis.detach()))
        return self._basis_index[key]

    def _direction(self, direction: Tensor, basis: int) -> int:
        key = (*_place(direction), direction.dtype, basis)
        if key not in self._direction_index:
            of_basis = self._bases[basis]
            with torch.no_grad(), without_autocast(direction.device.type):
                ready = against_coefficients(of_basis.ready, direction.detach()).contiguous()
            versions = (*_seen(direction), *of_basis.checked)
            self._direction_index[key] = len(self._directions)
            self._directions.append(_Direction(direction, basis, versions, ready, direction.detach()))
        return self._direction_index[key]

    def _refresh(self) -> None:
        """Takes in what was changed since the last call: bases, directions, storage of the tensors."""
        # Asked of all at once: one after the other would be a third of a call on two cores.
        if (
            self._uncounted
            or list(map(_COUNT, self._sources)) != self._counts
            or list(map(Tensor.data_ptr, self._sources)) != self._addresses
        ):
            self._refresh_bases()
        pointers, shapes, strides = self._places
        if (
            list(map(Tensor.data_ptr, self._tensors)) != pointers
            or list(map(Tensor.size, self._tensors)) != shapes
            or list(map(Tensor.stride, self._tensors)) != strides
        ):
            self._refresh_tensors()

    def _refresh_bases(self) -> None:
        for basis in self._bases:
            now = _seen(basis.source)
            if now[0] is None or now != basis.checked:
                if basis.source.shape != basis.ready.shape:
                    raise ValueError(
                        f"{OP}: {basis.name} had shape {tuple(basis.ready.shape)} when the plan was built; "
                        f"got {describe(basis.source)}"
                    )
                check_orthonormal(OP, basis.name, basis.source)
                if now[1] != basis.checked[1]:  # `.data` was replaced: what was taken over may be another's memory
                    basis.ready = basis.source.detach().to(basis.ready.dtype).contiguous()
                    self._prepared = None
                elif basis.ready.data_ptr() != now[1]:
                    basis.ready.copy_(basis.source)
                basis.checked, basis.held = now, basis.source.detach()
        for direction in self._directions:
            versions = (*_seen(direction.source), *self._bases[direction.basis].checked)
            if None in versions or versions != direction.versions:
                with without_autocast(direction.source.device.type):
                    direction.ready.copy_(against_coefficients(self._bases[direction.basis].ready, direction.source))
                direction.versions, direction.held = versions, direction.source.detach()
        self._look_at_sources()

    def _refresh_tensors(self) -> None:
        for i, (entry, shape, kind) in enumerate(zip(self._entries, self._places[1], self._kind_of, strict=True)):
            if (entry.tensor.shape, entry.tensor.device, entry.tensor.dtype) != (shape, *kind):
                raise ValueError(
                    f"{OP}: entries[{i}] tensor had shape {tuple(shape)} when the plan was built, dtype {kind[1]}, "
                    f"device {kind[0]}; got {describe(entry.tensor)}"
                )
            check_writable(OP, f"entries[{i}] tensor", entry.tensor)
        check_no_overlaps(
            OP,
            {f"entries[{i}]": e.tensor for i, e in enumerate(self._entries)},
            {b.name: b.source for b in self._bases},
        )
        self._look()
        self._prepared = None

    def _look(self) -> None:
        """Keeps what a call would otherwise ask of every tensor anew: it changes with the storage only."""
        tensors = self._tensors
        self._places = [t.data_ptr() for t in tensors], [t.shape for t in tensors], [t.stride() for t in tensors]
        self._kind_of = [(tensor.device, tensor.dtype) for tensor in tensors]
        self._kinds = dict(zip(self._kind_of, tensors, strict=True))
        self._versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]

    def _look_at_sources(self) -> None:
        """The versions that bases and directions were taken in at; some do not count theirs, see `version`."""
        sources = [*(b.source for b in self._bases), *(d.source for d in self._directions)]
        self._uncounted = any(source.is_inference() for source in sources)
        self._sources = [] if self._uncounted else sources
        self._counts = [source._version for source in self._sources]
        self._addresses = [source.data_ptr() for source in self._sources]

    def _prepare(
        self, chosen: dict[tuple[torch.device, torch.dtype], Backend]
    ) -> list[tuple[torch.device, Callable[[], None]]]:
        """One call per device and back-end; entries that share a basis stand together."""
        calls = []
        groups: dict[tuple[torch.device, str], list[_Entry]] = {}
        for entry in self._entries:
            kind = (entry.tensor.device, entry.tensor.dtype)
            if entry.tensor.numel() > 0 and self._bases[entry.basis].ready.shape[1] > 0:
                groups.setdefault((kind[0], chosen[kind].name), []).append(entry)
        backends = {backend.name: backend for backend in chosen.values()}
        for (device, name), entries in groups.items():
            entries.sort(key=lambda e: e.basis)
            bases = sorted({e.basis for e in entries})
            directions = sorted({e.direction for e in entries if e.direction >= 0})
            run = backends[name].prepare_projection(
                [e.tensor.detach() for e in entries],
                [e.dim for e in entries],
                [self._bases[b].ready for b in bases],
                [bases.index(e.basis) for e in entries],
                [self._directions[d].ready for d in directions],
                [directions.index(e.direction) if e.direction >= 0 else -1 for e in entries],
                self.strength,
            )
            calls.append((device, run))
        return calls


def _seen(tensor: Tensor) -> tuple[int | None, int]:
    """What shows that a tensor was changed: its version, and its address, for `.data` can be replaced."""
    return version(tensor), tensor.data_ptr()


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _listed(entries: Any) -> list[tuple[Any, Any, Any]]:
    if isinstance(entries, (str, bytes, Tensor, dict)) or not hasattr(entries, "__iter__"):
        raise TypeError(f"{OP}: entries must be a sequence of (tensor, basis, dim); got {describe(entries)}")
    listed = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, (tuple, list)) or len(entry) != 3:
            raise TypeError(f"{OP}: entries[{i}] must be (tensor, basis, dim); got {describe(entry)}")
        listed.append((entry[0], entry[1], entry[2]))
    return listed


def _directions(only_against: Any, count: int) -> list[Any]:
    if only_against is None:
        return [None] * count
    if isinstance(only_against, Tensor) or not isinstance(only_against, Sequence):
        raise TypeError(
            f"{OP}: only_against must be None or a sequence with one direction or None per entry; "
            f"got {describe(only_against)}"
        )
    if len(only_against) != count:
        raise ValueError(f"{OP}: only_against must have one item per entry = {count}; got {len(only_against)}")
    return list(only_against)

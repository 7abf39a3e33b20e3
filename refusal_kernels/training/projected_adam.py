"""ProjectedAdamW: AdamW whose update never enters a subspace.

A gradient in the complement of span(U) does not keep Adam there: the division by sqrt(v) mixes the coordinates, and
momentum and weight decay bring in what was never projected. Here the update itself is projected, in the step that makes
it:

    1. g, m, v, p -> m, v and the movement d, decoupled weight decay included; U^T d, slab by slab
    2. p += d - s U (U^T d)

d is a workspace of the held parameters' size. Bytes per parameter in fp32, as a prediction, beside the reads of U:

    28  AdamW alone, fused: g, m, v, p read, m, v, p written
    40  this in two sweeps (Triton): g, m, v, p read, m, v, d written; d, p read, p written (36 without weight decay,
        which is what has p read by the first sweep)
    60  this from primitives (CPU): d = -lr wd p, Adam on d, the two sweeps of the projection, p += d
    72  AdamW, then by hooks: the copy before (8), the difference (12), its projection (12), the sum (12)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..backends import Backend, Request, requested_backend, select
from ..checks import check_not_negative, describe
from ..ops.basis_checks import check_orthonormal, check_projection, check_strength
from ..ops.library import without_autocast
from ..ops.overlaps import check_no_overlaps, check_writable
from .optimizer import check_betas, check_offered, check_state_dict

OP = "ProjectedAdamW"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Held:
    """The basis of a held parameter, [n, r] contiguous in the parameter's dtype, and the dimension it spans."""

    basis: Tensor
    dim: int


@dataclass
class _Batch:
    """Held parameters that one call steps: of one group, device, dtype and count of steps; with what was looked up of
    each of them, which is asked for anew when it has changed."""

    at: list[int]  # where in the group
    parameters: list[Tensor]
    states: list[dict[str, Any]] = field(default_factory=list)
    counts: Tensor | None = None  # [len(parameters)] fp32 on the CPU: the steps, counted up at once
    steps: list[Tensor] = field(default_factory=list)  # its elements, 0-d: each state's "step", as in torch's AdamW
    place: Any = None  # where everything lay when `run` was made, for the back-end of that name
    backend: str = ""
    run: Callable[..., None] | None = None


@dataclass
class _Group:
    """How the parameters of a group were told apart at the last step."""

    parameters: list[Tensor]
    present: list[int]  # those with a gradient
    batches: list[_Batch]
    plain: list[Tensor]


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW that moves the parameters it holds in the complement of a subspace only.

    Equivalent to, per step::

        before = [p.clone() for p, _, _ in bases]
        torch.optim.AdamW(params, lr, betas, eps, weight_decay).step()
        for (p, U, dim), old in zip(bases, before):
            p.copy_(old + rk.project_out(p - old, U, dim, strength))

    without the copies: the update, decoupled weight decay included, is projected before it is subtracted. Other
    parameters are stepped by torch's own AdamW. Parameters without a gradient are left alone. The state is
    torch.optim.AdamW's (`step`, `exp_avg`, `exp_avg_sq`), so checkpoints of either load into the other; a resumed run
    repeats an uninterrupted one bit for bit. Learning-rate schedulers, GradScaler, deepcopy and pickle work as with any
    optimizer; `maximize` and `amsgrad` are not offered. What p holds in span(U) before the first step stays there.

    Args:
        params: parameters or groups, as in torch.optim.AdamW; a group may have its own lr, betas, eps, weight_decay.
            Groups that `add_param_group` adds later are stepped by plain AdamW.
        bases: (parameter, basis, dim) of each parameter to be held. parameter: one of `params`, fp32 (fp64 on the
            reference and CPU back-ends), any shape of at least one dimension. basis: [parameter.shape[dim], r] with
            orthonormal columns on the same device; r = 0 is allowed. It is copied; entries that give the same one share
            the copy.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        strength: s in [0, 1], the share of the component in the subspace that is taken out of the update.
        backend: as in the operators; for the held parameters.

    Raises:
        ValueError, TypeError: an argument is not as said above; the message names it.
        BackendError (`step`): the back-end asked for cannot run a held parameter; nothing is changed then.

    Source: Loshchilov & Hutter, arXiv 1711.05101; the projection of the update: Adam-NSCL, Wang et al., CVPR 2021.
    """

    def __init__(
        self,
        params: Any,
        bases: Sequence[tuple[Tensor, Tensor, int]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        strength: float = 1.0,
        *,
        backend: str | None = None,
    ) -> None:
        self.strength = check_strength(OP, strength)
        requested_backend(backend)
        self.backend = backend
        self._groups: dict[int, _Group] = {}
        self._states: list[dict[str, Any]] = []  # of all parameters, at the end of the last step
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._held = self._hold(bases)

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer's own keeps its three attributes alone. What is prepared has addresses in it.
        options = {name: getattr(self, name) for name in ("strength", "backend", "_held")}
        return {**super().__getstate__(), **options, "_groups": {}, "_states": []}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every optimizer. Raises ValueError or TypeError for options that torch.optim.AdamW would refuse too."""
        super().add_param_group(param_group)
        try:
            _check_options(self.param_groups[-1])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a ProjectedAdamW or torch.optim.AdamW; bases and strength stay those of this optimizer."""
        check_state_dict(OP, state_dict, self.param_groups)
        for group in state_dict["param_groups"]:
            _check_options(group)
        super().load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """As in every optimizer. Counts of steps are copies: those of the optimizer lie side by side in one tensor."""
        found = super().state_dict()
        alone = {
            key: {**state, "step": state["step"].clone()} if isinstance(state.get("step"), Tensor) else state
            for key, state in found["state"].items()
        }
        return {**found, "state": alone}

    def held(self, parameter: Tensor) -> tuple[Tensor, int] | None:
        """(basis [n, r], dim) of a parameter whose updates are projected, None for any other, and where r = 0."""
        found = self._held.get(parameter)
        return None if found is None else (found.basis, found.dim)

    @torch._disable_dynamo  # traced, one group was stepped for another without a word
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the parameters that have a `.grad`, which is only read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        same_states = _same(self._states, list(self.state.values()))
        looked = [self._look(number, same_states) for number in range(len(self.param_groups))]
        requested = requested_backend(self.backend)
        chosen = [[_choose(batch, requested) for batch in group.batches] for group, _ in looked]
        for options, (group, _) in zip(self.param_groups, looked, strict=True):
            self._plain_step(options, group.plain)
        for options, (group, gradients), backends in zip(self.param_groups, looked, chosen, strict=True):
            for batch, backend in zip(group.batches, backends, strict=True):
                self._projected_step(batch, backend, [gradients[i] for i in batch.at], options)
        if not same_states or len(self._states) != len(self.state):
            self._states = list(self.state.values())
        return loss

    def _hold(self, bases: Any) -> dict[Tensor, _Held]:
        if isinstance(bases, (str, bytes, Tensor, dict)) or not hasattr(bases, "__iter__"):
            raise TypeError(f"{OP}: bases must be a sequence of (parameter, basis, dim); got {describe(bases)}")
        known = {id(p) for group in self.param_groups for p in group["params"]}
        held: dict[Tensor, _Held] = {}
        copies: dict[Any, Tensor] = {}
        sources = {}
        seen: set[int] = set()
        for i, entry in enumerate(bases):
            if not isinstance(entry, (tuple, list)) or len(entry) != 3:
                raise TypeError(f"{OP}: bases[{i}] must be (parameter, basis, dim); got {describe(entry)}")
            parameter, basis, dim = entry
            dim = check_projection(OP, parameter, basis, dim, None, f"bases[{i}] ")
            if id(parameter) not in known:
                raise ValueError(
                    f"{OP}: bases[{i}] must name one of params; got a tensor that is not among them, "
                    f"{describe(parameter)}"
                )
            if id(parameter) in seen:
                raise ValueError(
                    f"{OP}: bases[{i}] must name a parameter of its own; got one that an earlier entry has"
                )
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{OP}: bases[{i}] parameter must be fp32 or fp64, because rounding to 16 bits moves it in the "
                    f"subspace (keep fp32 weights and autocast); got {describe(parameter)}"
                )
            seen.add(id(parameter))
            check_writable(OP, f"bases[{i}] parameter", parameter)
            check_orthonormal(OP, f"bases[{i}] basis", basis)
            key = (basis.data_ptr(), basis.shape, basis.stride(), basis.dtype, basis.device, parameter.dtype)
            if key not in copies:
                copies[key] = basis.detach().to(parameter.dtype).clone(memory_format=torch.contiguous_format)
            if copies[key].numel() > 0 and parameter.numel() > 0:  # nothing to hold otherwise
                held[parameter] = _Held(copies[key], dim)
            sources[f"bases[{i}] parameter"] = parameter
        check_no_overlaps(OP, sources, {})
        return held

    def _look(self, number: int, same_states: bool) -> tuple[_Group, list[Tensor]]:
        """The group, told apart anew where something has changed, and the gradients of all its parameters, or None."""
        parameters: list[Tensor] = self.param_groups[number]["params"]
        gradients: list[Any] = [p.grad for p in parameters]
        present = [i for i, g in enumerate(gradients) if g is not None]
        if any(gradients[i].is_sparse for i in present):
            raise ValueError(f"{OP}: gradients must be dense; got a sparse one in param_groups[{number}]")
        known = self._groups.get(number)
        if (
            known is None
            or not same_states
            or known.present != present
            or not _same(known.parameters, parameters)
            or not all(map(_as_it_was, known.batches))
        ):
            known = self._groups[number] = self._tell_apart(list(parameters), present)
        return known, gradients

    def _tell_apart(self, parameters: list[Tensor], present: list[int]) -> _Group:
        batches: dict[Any, _Batch] = {}
        plain = []
        for i in present:
            p = parameters[i]
            if p not in self._held:
                plain.append(p)
                continue
            state = self.state.get(p)
            kind = (p.device, p.dtype, int(state["step"]) if state else 0)
            batch = batches.setdefault(kind, _Batch([], []))
            batch.at.append(i)
            batch.parameters.append(p)
        return _Group(parameters, present, list(batches.values()), plain)

    def _plain_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        states = [self._state(p, torch.preserve_format) for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            has_complex=any(p.is_complex() for p in parameters),
            amsgrad=False,
            maximize=False,
            **_options(group),  # type: ignore[arg-type]
        )

    def _projected_step(
        self, batch: _Batch, backend: Backend, gradients: list[Tensor], options: dict[str, Any]
    ) -> None:
        counts = self._take_up(batch) if batch.counts is None else batch.counts
        if batch.run is None or batch.backend != backend.name:
            batch.run, batch.backend, batch.place = self._prepare(batch, backend), backend.name, _place(batch)
        counts += 1
        o = _options(options)
        beta1, beta2, t = o["beta1"], o["beta2"], int(counts[0])
        if not all(map(Tensor.is_contiguous, gradients)):
            gradients = [g.contiguous() for g in gradients]
        with without_autocast(batch.parameters[0].device.type):
            batch.run(gradients, o["lr"], beta1, beta2, o["eps"], 1 - beta1**t, 1 - beta2**t, o["weight_decay"])
        torch.autograd.graph.increment_version(batch.parameters)

    def _take_up(self, batch: _Batch) -> Tensor:
        """The states of a new batch, made where there are none yet; returns their counts, moved into one tensor."""
        batch.states = [self._state(p, torch.contiguous_format) for p in batch.parameters]
        batch.counts = torch.tensor([float(s["step"]) for s in batch.states], dtype=torch.float32, device="cpu")
        batch.steps = list(batch.counts)
        for state, step in zip(batch.states, batch.steps, strict=True):
            state["step"] = step
            for name in MOMENTS:  # those of a torch.optim.AdamW lie as its parameters do
                state[name] = state[name].contiguous()
        return batch.counts

    def _prepare(self, batch: _Batch, backend: Backend) -> Callable[..., None]:
        moments = [[state[name] for state in batch.states] for name in MOMENTS]
        held = [self._held[p] for p in batch.parameters]
        bases = list({id(h.basis): h.basis for h in held}.values())
        index = {id(basis): i for i, basis in enumerate(bases)}
        device = batch.parameters[0].device  # a model may have been moved since
        for p, h, m in zip(batch.parameters, held, moments[0], strict=True):
            if not p.dtype == h.basis.dtype == m.dtype:
                raise ValueError(
                    f"{OP}: a held parameter is {describe(p)} now; its basis is {h.basis.dtype} and its moments are "
                    f"{m.dtype}, made before: make a new optimizer and load this one's state_dict() into it"
                )
        return backend.prepare_projected_adam(
            [p.detach() for p in batch.parameters],
            moments[0],
            moments[1],
            [h.dim for h in held],
            [basis.to(device) for basis in bases],
            [index[id(h.basis)] for h in held],
            self.strength,
        )

    def _state(self, parameter: Tensor, memory_format: torch.memory_format) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, memory_format=memory_format)
        return state


def _same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether both list the same objects; `==` would compare the numbers of tensors."""
    return list(map(id, before)) == list(map(id, now))


def _as_it_was(batch: _Batch) -> bool:
    """Whether its parameters still count their steps together, and all lies where it lay: `.data` can be replaced, a
    state as well, by load_state_dict or by anybody."""
    if batch.counts is None or not _same(batch.steps, [state.get("step") for state in batch.states]):
        return False
    counts = batch.counts.tolist()
    return counts.count(counts[0]) == len(counts) and batch.place == _place(batch)


def _choose(batch: _Batch, requested: str | None) -> Backend:
    first = batch.parameters[0]
    return select("projected_adam", Request(first.device.type, first.dtype), requested)


def _place(batch: _Batch) -> Any:
    moments = [state[name] for name in MOMENTS for state in batch.states]
    return (
        list(map(Tensor.data_ptr, batch.parameters)),
        list(map(Tensor.data_ptr, moments)),
        list(map(Tensor.stride, batch.parameters)),
    )


def _options(group: dict[str, Any]) -> dict[str, float]:
    """The numbers of a group by the names of torch's functional AdamW."""
    beta1, beta2 = group["betas"]
    numbers = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
    return {**numbers, "beta1": float(beta1), "beta2": float(beta2)}


def _check_options(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        check_not_negative(OP, name, group[name])
    check_betas(OP, group["betas"])
    check_offered(OP, {name: group[name] for name in ("amsgrad", "maximize") if name in group})

"""SAEAdam: Adam for the four tensors of a sparse autoencoder, with the decoder's constraints in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import compact
from ..backends import BACKENDS, Backend, Request, requested_backend, select
from ..checks import (
    check_encoder,
    check_flag,
    check_in_memory,
    check_not_negative,
    check_number,
    check_separate_memory,
    check_shape,
    describe,
)

# Options of torch.optim.Adam that its step asks a group for and this optimizer does not offer: as Adam has them.
NOT_OFFERED = {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class AdamStep:
    """The scalars of one Adam step, as the kernels take them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    bias_correction1: float
    bias_correction2: float

    def arguments(self) -> tuple[float, ...]:
        return self.lr, self.beta1, self.beta2, self.eps, self.bias_correction1, self.bias_correction2


class SAEAdam(torch.optim.Optimizer):
    """Adam over (W_enc, b_enc, W_dec, b_dec) that keeps the decoder rows at unit norm.

    Equivalent to, per step::

        W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) / W_dec.square().sum(-1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_([W_enc, b_enc, W_dec, b_dec], max_grad_norm)
        torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr, betas, eps).step()
        W_dec.data /= W_dec.data.norm(dim=-1, keepdim=True)

    Parallel removal, Adam and normalisation read and write each row once. `step()` takes the gradients from `.grad`;
    `sae_step(..., optimizer=this)` applies them without ever writing them out where the back-end can. A parameter
    without a gradient is left alone, normalisation included, as torch.optim.Adam leaves it. State per parameter is
    torch.optim.Adam's (`step`, `exp_avg`, `exp_avg_sq`), so checkpoints of either load into the other. Learning-rate
    schedulers, copy.deepcopy and pickle work as with any optimizer; `state_dict()` holds lr, betas, eps and the
    state, and the other options are those of the optimizer that loads it, which converts the state to its own form.

    State in fewer bytes, of W_enc and W_dec (`refusal_kernels.compact`): with `moment_dtype=torch.bfloat16` their
    moments take 4 bytes a weight instead of 8, rounded stochastically, from the step's number alone, so that a run can
    be repeated and resumed bit for bit. With `split_master=True` the weights are bf16 tensors, ready for the matrix
    products, and the state holds the 16 bits that make fp32 master weights of them (`low`, int16): the steps are those
    of fp32 weights under bf16 autocast, in 4 bytes a weight instead of 6 with the copy that autocast makes. Both: 8
    bytes a weight and 16 moved per step, instead of 14 and 26.

    Copies ("shadows") of fp32 weights for the forward pass: under autocast every step casts W_enc and W_dec to 16 bits.
    With `copy_dtype=torch.bfloat16` the pass that updates a weight writes its copy too, where the back-end can, and the
    next `sae_step` under bf16 autocast reads that: no cast, and 2 bytes a weight held instead of made anew. A copy
    that anything else has outdated is made again before it is read, whatever PyTorch counts as a change: a step of
    this class, an in-place operation, `load_state_dict`, another tensor as `.data`. What it does not count is a write
    through `.data` (`W_dec.data.mul_(2)`), a step of torch.optim's `fused=True` optimizers, a collective operation on
    the weights, or foreign code at the memory: call `forget_copies()` after that.

    Args:
        W_enc, W_dec: [F, d] leaf tensors; b_enc: [F]; b_dec: [d]; or with a head axis [H, F, d], [H, F], [H, d]; all
            of one dtype (fp32, or fp64 on the reference and CPU; 16 bits work, with moments of 16 bits too: keep fp32
            master weights and autocast, or `split_master`), or biases of fp32 beside weights of 16 bits; no two in the
            same memory (tied weights). They are the only group: `add_param_group` raises.
        lr, betas, eps: as in torch.optim.Adam.
        unit_norm_decoder: divide every decoder row by its norm after the update (rows of norm 0 stay 0).
        remove_parallel_grad: take the part of a decoder row's gradient that lies along the row out of it.
        max_grad_norm: clip the global gradient norm (of all four tensors, after parallel removal) to this, or None.
        moment_dtype: torch.float32 or torch.bfloat16 for the moments of W_enc and W_dec, beside fp32 or split weights;
            None: the parameter's, or fp32 for split ones.
        split_master: W_enc and W_dec, which must be bf16, are halves of fp32 master weights.
        copy_dtype: torch.bfloat16 or torch.float16 for copies of W_enc and W_dec, which must be fp32, or None.
        backend: as in the operators.

    Raises:
        ValueError, TypeError: a tensor or number is not as said above; the message names it.

    Source: Kingma & Ba, arXiv 1412.6980; the constraints: Bricken et al. 2023, Gao et al., arXiv 2406.04093, section A.
    """

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        unit_norm_decoder: bool = True,
        remove_parallel_grad: bool = True,
        max_grad_norm: float | None = None,
        *,
        moment_dtype: torch.dtype | None = None,
        split_master: bool = False,
        copy_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        check_sae_parameters("SAEAdam", W_enc, b_enc, W_dec, b_dec)
        check_not_negative("SAEAdam", "lr", lr)
        check_betas("SAEAdam", betas)
        check_not_negative("SAEAdam", "eps", eps)
        if max_grad_norm is not None:
            check_number("SAEAdam", "max_grad_norm", max_grad_norm, "a number greater than 0, or None", lambda v: v > 0)
        check_flag("SAEAdam", "unit_norm_decoder", unit_norm_decoder)
        check_flag("SAEAdam", "remove_parallel_grad", remove_parallel_grad)
        check_compact("SAEAdam", W_enc.dtype, moment_dtype, split_master)
        check_copy_dtype("SAEAdam", W_enc.dtype, copy_dtype)
        requested_backend(backend)
        self.moment_dtype = moment_dtype
        self.split_master = split_master
        self.copy_dtype = copy_dtype
        self.unit_norm_decoder = unit_norm_decoder
        self.remove_parallel_grad = remove_parallel_grad
        self.max_grad_norm = max_grad_norm
        self.backend = backend
        self._gradient_buffers: tuple[Tensor, Tensor] | None = None
        # By the number of the parameter: its copy, and the state of the parameter that the copy is of.
        self._copies: dict[int, Tensor] = {}
        self._copied: dict[int, _Contents | None] = {}
        super().__init__([W_enc, b_enc, W_dec, b_dec], {"lr": lr, "betas": betas, "eps": eps, **NOT_OFFERED})

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer's own keeps its three attributes alone. Gradient buffers are scratch, and copies can be made anew.
        options = (
            "unit_norm_decoder", "remove_parallel_grad", "max_grad_norm", "backend", "moment_dtype", "split_master",
            "copy_dtype",
        )  # fmt: skip
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in options},
            "_gradient_buffers": None,
            "_copies": {},
            "_copied": {},
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError: the four tensors given to the constructor are all that is stepped."""
        if self.param_groups:
            raise ValueError(
                "SAEAdam: add_param_group must not be called: the optimizer steps W_enc, b_enc, W_dec, b_dec and "
                "nothing else; give other parameters an optimizer of their own"
            )
        super().add_param_group(param_group)

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(W_enc, b_enc, W_dec, b_dec)."""
        return tuple(self.param_groups[0]["params"])  # type: ignore[return-value]

    @property
    def compact(self) -> bool:
        """Whether the state of W_enc and W_dec is in a form that `adam_rows` does not take."""
        return self.split_master or self.moment_dtype == torch.bfloat16

    def _form(self, parameter: Tensor) -> dict[str, torch.dtype]:
        """The tensors of a parameter's state, and their dtypes."""
        wide = torch.float32 if self.compact else parameter.dtype
        of_weights = parameter is self.parameters[0] or parameter is self.parameters[2]
        moment = (self.moment_dtype or wide) if of_weights else wide
        low = {"low": torch.int16} if of_weights and self.split_master else {}
        return {"exp_avg": moment, "exp_avg_sq": moment, **low}

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """(exp_avg, exp_avg_sq) of a parameter, made as zeros on first use."""
        state, form = self.state[parameter], self._form(parameter)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for name, dtype in form.items():
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if m.dtype != form["exp_avg"] or m.device != parameter.device:  # the module was moved or converted since
            raise ValueError(
                f"SAEAdam: a parameter is {describe(parameter)} now, and its moments, made before, are {describe(m)}: "
                "make a new optimizer and load this one's state_dict() into it"
            )
        return m, v

    def low(self, parameter: Tensor) -> Tensor | None:
        """The lower halves of a weight's master weights, int16 in its shape; None where weights are not split."""
        self.moments(parameter)
        return self.state[parameter].get("low")

    def _number(self, parameter: Tensor) -> int:
        return next(i for i, p in enumerate(self.parameters) if p is parameter)

    def salt(self, parameter: Tensor) -> int:
        """What the stochastic rounding of a weight's moments in the step that was counted last begins with."""
        return compact.salt_of(int(self.state[parameter]["step"]), self._number(parameter))

    @torch.no_grad()
    def copy_of(self, parameter: Tensor) -> Tensor:
        """The copy in `copy_dtype` of W_enc or W_dec as it is now; made again where it is outdated."""
        if self.copy_dtype is None:
            raise ValueError("SAEAdam: copy_of needs an optimizer made with copy_dtype; got None")
        number = self._number(parameter)
        kept = self._copies.get(number)
        if kept is None or kept.shape != parameter.shape or kept.device != parameter.device:
            self._copied.pop(number, None)
            kept = torch.empty(parameter.shape, dtype=self.copy_dtype, device=parameter.device)
            self._copies[number] = kept
        now = _Contents.of(parameter)
        if now is None or now != self._copied.get(number):
            kept.copy_(parameter)
            self._copied[number] = now
        return kept

    def copies_written(self) -> None:
        """Says that the copies are of the weights as they are now: for the pass that has written both."""
        self._copied = {number: _Contents.of(self.parameters[number]) for number in self._copies}

    def forget_copies(self) -> None:
        """Has all copies made again before they are read: for whoever wrote to the weights unseen by PyTorch."""
        self._copied.clear()

    def master(self, parameter: Tensor) -> Tensor:
        """A parameter in full precision: fp32 of split weights, else the parameter itself, detached."""
        low = self.low(parameter)
        return parameter.detach() if low is None else compact.join(parameter.detach(), low)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, of this optimizer or of torch.optim.Adam, converting it to this optimizer's
        form: moments rounded to nearest, lower halves zero where there were none.

        Raises ValueError or TypeError for anything else, for state of other shapes, and for groups of torch.optim.Adam
        with weight_decay, amsgrad or maximize, which are not offered."""
        check_state_dict("SAEAdam", state_dict, self.param_groups)
        for group in state_dict["param_groups"]:
            check_offered("SAEAdam", group)
        super().load_state_dict(state_dict)
        for name, value in NOT_OFFERED.items():
            self.param_groups[0].setdefault(name, value)
        # Optimizer's own casts every tensor to the parameter's dtype: what it was given is looked at once more.
        for key, parameter in zip(state_dict["param_groups"][0]["params"], self.parameters, strict=True):
            given, state = state_dict["state"].get(key), self.state.get(parameter)
            if not given or not state:
                continue
            # A count of its own: Optimizer's load_state_dict keeps the tensor that another optimizer counts in.
            state["step"] = torch.as_tensor(given["step"], dtype=torch.float32, device="cpu").clone()
            for name, dtype in self._form(parameter).items():
                like: dict[str, Any] = {"dtype": dtype, "device": parameter.device}
                if name in given:
                    state[name] = given[name].detach().to(**like, copy=True).contiguous()
                else:
                    state[name] = torch.zeros(parameter.shape, **like)
            if "low" not in self._form(parameter):
                state.pop("low", None)

    def gradient_buffers(self, dtype: torch.dtype, zero: bool = True) -> tuple[Tensor, Tensor]:
        """Tensors of the shapes of W_enc and W_dec, zeroed or as they are, the same ones at every step: fresh ones are
        paid for in page faults. Only a step that has to see the whole gradient before it moves (clipping) asks for
        them."""
        W_enc, _, W_dec, _ = self.parameters
        buffers = self._gradient_buffers
        if buffers is None or buffers[0].dtype != dtype or buffers[0].device != W_enc.device:
            options: dict[str, Any] = {"dtype": dtype, "device": W_enc.device}
            buffers = self._gradient_buffers = (
                torch.empty(W_enc.shape, **options),
                torch.empty(W_dec.shape, **options),
            )
        if zero:
            torch._foreach_zero_(buffers)
        return buffers

    @property
    def in_step(self) -> bool:
        """Whether the four parameters have been stepped equally often: a kernel for all has one bias correction."""
        states = [self.state.get(p) for p in self.parameters]
        return len({float(state["step"]) if state else 0.0 for state in states}) == 1

    def advance(self, parameter: Tensor) -> AdamStep:
        """Counts one step of a parameter and returns its scalars."""
        group = self.param_groups[0]
        check_offered("SAEAdam", group)
        beta1, beta2 = group["betas"]
        self.moments(parameter)
        # The kernels write unseen by PyTorch: this is said for the copies of other optimizers, and for autograd.
        self._copied.pop(self._number(parameter), None)
        if not parameter.is_inference():
            torch.autograd.graph.increment_version(parameter)
        self.state[parameter]["step"] += 1
        t = float(self.state[parameter]["step"])
        # Learning-rate schedulers look for this mark of a step taken before them; `sae_step` does not go through
        # `step()`.
        self._opt_called = True
        return AdamStep(float(group["lr"]), beta1, beta2, group["eps"], 1 - beta1**t, 1 - beta2**t)

    @torch._disable_dynamo  # traced, Python's counting of steps went to the wrong parameter without a word
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the parameters that have a `.grad`, which is only read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        dW_enc, db_enc, dW_dec, db_dec = (p.grad for p in self.parameters)
        self.apply_gradients(dW_enc, db_enc, dW_dec, db_dec, backend=self.backend)
        return loss

    @torch._disable_dynamo
    @torch.no_grad()
    def apply_gradients(
        self,
        dW_enc: Tensor | None,
        db_enc: Tensor | None,
        dW_dec: Tensor | None,
        db_dec: Tensor | None,
        backend: str | None = None,
    ) -> None:
        """The same step from gradients given as tensors of the parameters' shapes, which are only read; None leaves a
        parameter alone."""
        gradients = tuple(None if g is None else g.resolve_neg() for g in (dW_enc, db_enc, dW_dec, db_dec))
        chosen = self._select(self.parameters[0], backend)
        factor = None
        if self.max_grad_norm is not None:
            factor = self._clip_factor(self.max_grad_norm, gradients)
        for name, parameter, gradient in zip(PARAMETERS, self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            step = self.advance(parameter)
            if name.startswith("b_"):
                self.update_vector(parameter, gradient, step, factor)
            else:
                constraints = (self.remove_parallel_grad, self.unit_norm_decoder) if name == "W_dec" else (False, False)
                self._rows(chosen, parameter, gradient, step, factor, *constraints)

    def _clip_factor(self, max_grad_norm: float, gradients: tuple[Tensor | None, ...]) -> Tensor | None:
        """min(1, max_grad_norm / (norm + 1e-6)) as a 0-dim tensor: clip_grad_norm_'s formula, no gradient written."""
        present = [g for g in gradients if g is not None]
        if not present:
            return None
        squares = torch.stack(torch._foreach_norm(present)).square().sum()
        if self.remove_parallel_grad and (dW_dec := gradients[2]) is not None:
            W_dec = self.master(self.parameters[2]).to(dW_dec.dtype)  # 16-bit weights' gradients may come in fp32
            along = torch.einsum("...d,...d->...", dW_dec, W_dec)
            squared_norm = torch.einsum("...d,...d->...", W_dec, W_dec)
            squares -= torch.where(squared_norm > 0, along.square() / squared_norm, 0).sum()
        norm = squares.clamp(min=0).sqrt()
        return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def update_vector(self, parameter: Tensor, grad: Tensor, step: AdamStep, factor: Tensor | None = None) -> None:
        """Adam on a bias: too small for a kernel of its own."""
        m, v = self.moments(parameter)
        BACKENDS["reference"].adam_rows(  # type: ignore[attr-defined]
            parameter[None], grad[None], m[None], v[None], *step.arguments(), factor, False, False
        )

    def _rows(
        self,
        chosen: Backend,
        W: Tensor,
        g: Tensor,
        step: AdamStep,
        factor: Tensor | None,
        remove_parallel: bool,
        unit_norm: bool,
    ) -> None:
        m, v = self.moments(W)
        target = W if W.is_contiguous() else W.contiguous()
        d = W.shape[-1]
        options = (*step.arguments(), factor, remove_parallel, unit_norm)
        if self.compact:
            low = self.low(W)
            g = g.to(W.dtype if low is None else torch.float32).contiguous()
            low_rows = None if low is None else low.view(-1, d)
            rows = [t.view(-1, d) for t in (g, m, v)]
            chosen.adam_compact_rows(target.view(-1, d), low_rows, *rows, *options, self.salt(W))
        else:
            rows = [t.view(-1, d) for t in (target, g.to(W.dtype).contiguous(), m, v)]
            chosen.adam_rows(*rows, *options)  # type: ignore[attr-defined]
        if target is not W:
            W.copy_(target)

    def _select(self, W: Tensor, backend: str | None) -> Backend:
        request = Request(W.device.type, W.dtype, n_latents=W.shape[-2], d=W.shape[-1])
        return select("sae_adam", request, requested_backend(backend))


@dataclass(frozen=True)
class _Contents:
    """What shows that a tensor holds other numbers than before: its version, and its storage, for `.data` can be
    replaced. The storage is known by a weak reference, beside which no other one can take its place in memory."""

    version: int
    storage: StorageWeakRef
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Contents | None:
        """None for a tensor of inference mode, which counts nothing."""
        if tensor.is_inference():
            return None
        return cls(tensor._version, StorageWeakRef(tensor.untyped_storage()), int(tensor.storage_offset()))


def check_offered(op: str, group: dict[str, Any]) -> None:
    """A parameter group has none of the options of torch's optimizers that are not offered here."""
    for name, value in NOT_OFFERED.items():
        if group.get(name, value) != value:
            raise ValueError(f"{op}: {name} is not offered; got a parameter group with {name}={group[name]!r}")


def check_state_dict(op: str, state_dict: Any, groups: list[dict[str, Any]]) -> None:
    """`state_dict` is what a `state_dict()` returned, and its moments have the shapes of the parameters."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        got = f"the keys {sorted(map(str, state_dict))}" if isinstance(state_dict, dict) else describe(state_dict)
        raise ValueError(f"{op}: state_dict must be what state_dict() returned, with state and param_groups; got {got}")
    for number, (saved, own) in enumerate(zip(state_dict["param_groups"], groups, strict=False)):  # lengths: torch's
        for i, (key, parameter) in enumerate(zip(saved["params"], own["params"], strict=False)):
            state = state_dict["state"].get(key) or {}
            for name in ("exp_avg", "exp_avg_sq") if state else ():
                moment = state.get(name)
                if not isinstance(moment, Tensor) or moment.shape != parameter.shape:
                    raise ValueError(
                        f"{op}: state_dict must hold {name} of shape {tuple(parameter.shape)} for parameter {i} of "
                        f"group {number}; got {describe(moment)}"
                    )


def check_betas(op: str, betas: Any) -> None:
    """`betas` is a pair of numbers in [0, 1)."""
    expected = "two numbers in [0, 1)"
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{op}: betas must be {expected}; got {describe(betas)}")
    for beta in betas:
        check_number(op, "betas", beta, expected, lambda v: 0 <= v < 1)


def check_compact(op: str, weights: torch.dtype, moment_dtype: Any, split_master: Any) -> None:
    """The forms of state in fewer bytes, and what they need."""
    check_flag(op, "split_master", split_master)
    if split_master and weights != torch.bfloat16:
        raise ValueError(f"{op}: split_master needs W_enc and W_dec of torch.bfloat16; got {weights}")
    if moment_dtype is None:
        return
    if moment_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{op}: moment_dtype must be torch.float32, torch.bfloat16 or None; got {moment_dtype!r}")
    if weights != torch.float32 and not split_master:
        raise ValueError(
            f"{op}: moment_dtype needs W_enc and W_dec of torch.float32, or split_master=True; got {weights}"
        )


def check_copy_dtype(op: str, weights: torch.dtype, copy_dtype: Any) -> None:
    """Copies are of 16 bits, beside fp32 weights."""
    if copy_dtype is None:
        return
    if copy_dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{op}: copy_dtype must be torch.bfloat16, torch.float16 or None; got {copy_dtype!r}")
    if weights != torch.float32:
        raise ValueError(f"{op}: copy_dtype needs W_enc and W_dec of torch.float32; got {weights}")


def check_sae_parameters(op: str, W_enc: Any, b_enc: Any, W_dec: Any, b_dec: Any) -> tuple[int, int]:
    """The four tensors of a sparse autoencoder fit together; returns (F, d)."""
    if not isinstance(W_dec, Tensor):
        raise TypeError(f"{op}: W_dec must be a torch.Tensor; got {describe(W_dec)}")
    if not isinstance(b_dec, Tensor):
        raise TypeError(f"{op}: b_dec must be a torch.Tensor; got {describe(b_dec)}")
    n_latents, d = check_encoder(op, W_dec, W_enc, b_enc, b_dec, x_name="W_dec", heads=True)
    heads = W_enc.dim() == 3
    check_shape(op, "W_dec", W_dec, tuple(W_enc.shape), "[H, F, d]" if heads else "[F, d]")
    for name, tensor in (("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
        if tensor.dtype != W_enc.dtype and not (name != "W_dec" and _beside(tensor.dtype, W_enc.dtype)):
            raise ValueError(f"{op}: {name} must have the dtype of W_enc, {W_enc.dtype}; got {tensor.dtype}")
    for name, tensor in zip(PARAMETERS, (W_enc, b_enc, W_dec, b_dec), strict=True):
        if not tensor.is_leaf:
            raise ValueError(f"{op}: {name} must be a leaf tensor (a parameter); got the result of an operation")
        if tensor.device.type != "meta":  # on which all of a step can be tried out, values aside
            check_in_memory(op, name, tensor)
    check_separate_memory(op, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)
    return n_latents, d


def _beside(bias: torch.dtype, weights: torch.dtype) -> bool:
    """Whether biases of a dtype of their own are taken: fp32 beside weights of 16 bits."""
    return bias == torch.float32 and weights in (torch.bfloat16, torch.float16)

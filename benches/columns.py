"""The columns of every group: what is timed, what prepares it, and what its result has to be.

A column is a callable and, where a call consumes its inputs (an autograd graph), a `prepare` that makes them and is not
timed. `Case` builds the columns of one group at one shape on shared inputs, chooses the fastest form of the sparse
path, and verifies a result against the fp64 reference of `problem`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels.backends import BACKENDS

from . import model, torch_paths
from .problem import BETAS, EPS, LR, Problem, relative_error
from .torch_paths import SparsePath

# Norm-wise relative errors against fp64. fp32 products of these sizes are off by about 1e-6; a wrong selection, a
# missing token or a missing mask by more than 1e-3.
TOLERANCE = {"encode": 1e-5, "decode": 1e-5, "backward": 1e-4, "step": 1e-3}
# Of the largest element of a gradient: what lies below may have either sign in fp32.
SIGN_IS_ROUNDING = 1e-5
# The sparse path as it is usually written.
USUAL_FORMS = {"encode": "fresh", "decode": "bag", "backward": "index_add"}
CALIBRATION_ROUNDS = 2
HOPELESS = 2.0  # a form this many times slower than another in the warm-up is not tried again


@dataclass
class Column:
    """One contestant. `run(*prepare())` is a call; `dense` says which flop model applies."""

    name: str
    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple
    form: str = ""
    dense: bool = False
    forms: dict[str, float] = field(default_factory=dict)  # seconds of the forms that were tried


class Case:
    """The columns of one group for one problem."""

    def __init__(
        self,
        problem: Problem,
        group: str,
        backend: str | None = None,
        forms: dict[str, str] | None = None,
        sparse: SparsePath | None = None,
    ) -> None:
        """`forms` fixes the sparse path's form per group (encode, decode, backward) instead of measuring it; `sparse`
        is that of another case of the problem, whose kept buffers serve both."""
        self.problem, self.group, self.backend = problem, group, backend
        self.forms = {} if forms is None else forms
        self.sparse = SparsePath(problem) if sparse is None else sparse
        self._moments: list[tuple[Tensor, Tensor]] | None = None
        self._initial: list[Tensor] | None = None
        self._columns: dict[str, Column] = {}

    def column(self, name: str) -> Column:
        """The contestant of that name, built on first use."""
        if name not in self._columns:
            self._columns[name] = getattr(self, f"_{self.group}_{name}")()
        return self._columns[name]

    def has(self, name: str) -> bool:
        return hasattr(self, f"_{self.group}_{name}")

    def choose_forms(self) -> None:
        """Measures which forms column `best` takes, and keeps nothing of it but the choice."""
        if self.group == "step":
            _ = self._best_parts
        else:
            self.column("best")
        self.sparse.drop_buffers()

    @property
    def _leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(p.requires_grad_() for p in self.problem.parameters)  # type: ignore[return-value]

    # --- encode ----------------------------------------------------------------------------------------------------

    def _encode_dense(self) -> Column:
        return Column("dense", torch.no_grad()(self.sparse.encode_fresh), dense=True)

    def _encode_compile(self) -> Column:
        p = self.problem
        compiled = torch.compile(torch_paths.encode, dynamic=False)
        return Column(
            "compile", torch.no_grad()(lambda: compiled(p.x, p.W_enc, p.b_enc, p.b_dec, p.shape.k)), dense=True
        )

    def _encode_sparse(self) -> Column:
        return self._usual_sparse()

    def _encode_best(self) -> Column:
        form, forms = self._fastest("encode", self.sparse.encoders)
        return Column("best", torch.no_grad()(self.sparse.encoders[form]), form=form, forms=forms)

    def _encode_ours(self) -> Column:
        p = self.problem

        @torch.no_grad()
        def run() -> tuple[Tensor, Tensor]:
            return rk.topk_encode(p.x, p.W_enc, p.b_enc, p.shape.k, p.b_dec, backend=self.backend)

        return Column("ours", run)

    def _encode_floor(self) -> Column:
        p = self.problem
        out: list[Tensor] = []

        @torch.no_grad()
        def run() -> Tensor:
            if not out:
                out.append(p.x.new_empty(p.shape.n, p.shape.f))
            return torch.mm(p.x, p.W_enc.t(), out=out[0])

        return Column("floor", run, form="mm(out=)")

    # --- decode ----------------------------------------------------------------------------------------------------

    def _decode_dense(self) -> Column:
        p = self.problem
        values, indices = p.codes
        run = torch.no_grad()(lambda: torch_paths.dense_decode(values, indices, p.W_dec, p.b_dec))
        return Column("dense", run, dense=True)

    def _decode_compile(self) -> Column:
        p = self.problem
        values, indices = p.codes
        compiled = torch.compile(torch_paths.dense_decode, dynamic=False)
        return Column("compile", torch.no_grad()(lambda: compiled(values, indices, p.W_dec, p.b_dec)), dense=True)

    def _decode_sparse(self) -> Column:
        return self._usual_sparse()

    def _decode_best(self) -> Column:
        values, indices = self.problem.codes
        form, forms = self._fastest("decode", self.sparse.decoders, values, indices)
        return Column(
            "best", torch.no_grad()(lambda: self.sparse.decoders[form](values, indices)), form=form, forms=forms
        )

    def _decode_ours(self) -> Column:
        p = self.problem
        values, indices = p.codes
        return Column(
            "ours", torch.no_grad()(lambda: rk.sparse_decode(values, indices, p.W_dec, p.b_dec, backend=self.backend))
        )

    def _decode_floor(self) -> Column:
        return self._copy_floor()

    # --- backward: from the loss (or the residual it consists of) to the gradients of the four parameters ------------

    def _graph(self, loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor]]:
        leaves = self._leaves
        p = self.problem
        return lambda: (loss(p.x, *leaves, p.shape.k),)

    def _backward_dense(self) -> Column:
        leaves = self._leaves
        run = lambda loss: torch.autograd.grad(loss, leaves)  # noqa: E731
        return Column("dense", run, self._graph(torch_paths.dense_loss), dense=True)

    def _backward_compile(self) -> Column:
        leaves = self._leaves
        run = lambda loss: torch.autograd.grad(loss, leaves)  # noqa: E731
        return Column("compile", run, self._graph(torch.compile(torch_paths.dense_loss, dynamic=False)), dense=True)

    def _backward_sparse(self) -> Column:
        return self._usual_sparse()

    def _backward_best(self) -> Column:
        leaves = self._leaves
        e = self._residual()
        candidates: dict[str, Column] = {
            form: Column("best", torch.no_grad()(lambda form=form: self.sparse.gradients(form, *self.problem.codes, e)))
            for form in self.sparse.weight_gradients
        }
        run = lambda loss: torch.autograd.grad(loss, leaves)  # noqa: E731
        candidates["autograd"] = Column("best", run, self._graph(torch_paths.bag_loss))
        form, forms = self._fastest_column("backward", candidates)
        column = candidates[form]
        column.form, column.forms = form, forms
        return column

    def _residual(self) -> Tensor:
        with torch.no_grad():
            return self.sparse.decode_bag(*self.problem.codes) - self.problem.x

    def _backward_ours(self) -> Column:
        """What sae_step runs between its residual and `.grad`; the gradients are kept, and zeroed in place: in the
        buffers of the sparse path, as another pair would be two more weight matrices."""
        p = self.problem
        _, d, f, _ = p.shape
        e = self._residual()
        values, indices = p.codes
        scale = 2.0 / p.shape.n

        @torch.no_grad()
        def run() -> tuple[Tensor, ...]:
            W_enc, _, W_dec, b_dec = (t.detach() for t in p.parameters)
            dW_enc, dW_dec = self.sparse.buffer("dW_enc", f, d), self.sparse.buffer("dW_dec", f, d)
            db_enc = self.sparse.buffer("db_enc", f)
            torch._foreach_zero_((dW_enc, db_enc, dW_dec))
            self.native.sae_backward(e, p.x, values, indices, W_enc, W_dec, b_dec, scale, dW_enc, db_enc, dW_dec)
            return dW_enc, db_enc, dW_dec, scale * e.sum(0) - db_enc @ W_enc

        return Column("ours", run, form="sae_backward")

    def _backward_autograd(self) -> Column:
        """Our operators under autograd: loss.backward() of the plain route."""
        leaves = self._leaves
        run = lambda loss: torch.autograd.grad(loss, leaves)  # noqa: E731
        return Column("autograd", run, self._graph(self._operator_loss))

    def _operator_loss(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Tensor:
        values, indices = rk.topk_encode(x, W_enc, b_enc, k, b_dec, backend=self.backend)
        x_hat = rk.sparse_decode(values, indices, W_dec, b_dec, backend=self.backend)
        return (x_hat - x).square().sum() / x.shape[0]

    def _backward_floor(self) -> Column:
        return self._copy_floor()

    @property
    def native(self) -> Any:
        """The back-end that sae_step takes here."""
        name = self.backend or {"cpu": "cpu", "cuda": "triton"}[self.problem.device.type]
        return BACKENDS[name]

    # --- step: forward, backward, Adam, unit norm of the decoder rows ------------------------------------------------

    def reset(self) -> None:
        """Parameters and moments as before the first step."""
        with torch.no_grad():
            if self._initial is None:
                self._initial = [p.clone() for p in self.problem.parameters]
            for parameter, initial in zip(self.problem.parameters, self._initial, strict=True):
                parameter.copy_(initial)
                parameter.grad = None
            for m, v in self._shared_moments:
                m.zero_()
                v.zero_()

    @property
    def _shared_moments(self) -> list[tuple[Tensor, Tensor]]:
        """One set of Adam moments for all columns: a set each would not fit into memory at the largest shape."""
        if self._moments is None:
            self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.problem.parameters]
        return self._moments

    def _autograd_step(self, name: str, loss: Callable[..., Tensor], **kwargs: Any) -> Column:
        leaves = self._leaves
        p = self.problem
        optimizer = torch_paths.adam(list(leaves), self._shared_moments)

        def run() -> Tensor:
            optimizer.zero_grad()
            value = loss(p.x, *leaves, p.shape.k)
            value.backward()
            optimizer.step()
            torch_paths.unit_norm_(leaves[2])
            return value.detach()

        return Column(name, run, **kwargs)

    def _step_dense(self) -> Column:
        return self._autograd_step("dense", torch_paths.dense_loss, dense=True)

    def _step_compile(self) -> Column:
        return self._autograd_step("compile", torch.compile(torch_paths.dense_loss, dynamic=False), dense=True)

    def _step_sparse(self) -> Column:
        return self._usual_sparse()

    @cached_property
    def _best_parts(self) -> tuple[Column, ...]:
        """Column `best` of the parts of a step."""
        parts = ("encode", "decode", "backward")
        return tuple(Case(self.problem, part, forms=self.forms, sparse=self.sparse).column("best") for part in parts)

    def _step_best(self) -> Column:
        p = self.problem
        leaves = self._leaves
        encode, decode, backward = self._best_parts
        forms = {c.form: min(c.forms.values()) for c in (encode, decode, backward) if c.forms}
        form = " + ".join(c.form for c in (encode, decode, backward))
        if backward.form == "autograd":
            return self._autograd_step("best", torch_paths.bag_loss, form=form, forms=forms)
        optimizer = torch_paths.adam(list(leaves), self._shared_moments)

        @torch.no_grad()
        def run() -> Tensor:
            values, indices = self.sparse.encoders[encode.form]()
            e = self.sparse.decoders[decode.form](values, indices).sub_(p.x)
            for parameter, gradient in zip(
                leaves, self.sparse.gradients(backward.form, values, indices, e), strict=True
            ):
                parameter.grad = gradient
            optimizer.step()
            torch_paths.unit_norm_(leaves[2])
            return torch.vdot(e.view(-1), e.view(-1)) / p.shape.n

        return Column("best", run, form=form, forms=forms)

    def _sae_adam(self) -> rk.SAEAdam:
        # The parallel part of the gradient stays in, as in the other columns' Adam.
        optimizer = rk.SAEAdam(*self._leaves, lr=LR, betas=BETAS, eps=EPS, remove_parallel_grad=False)
        for parameter, (m, v) in zip(self._leaves, self._shared_moments, strict=True):
            step = torch.zeros((), dtype=torch.float32)
            optimizer.state[parameter] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        return optimizer

    def _step_ours(self) -> Column:
        p = self.problem
        leaves = self._leaves
        optimizer = self._sae_adam()
        return Column(
            "ours", lambda: rk.sae_step(p.x, *leaves, p.shape.k, optimizer=optimizer, backend=self.backend).loss
        )

    def _step_autograd(self) -> Column:
        p = self.problem
        leaves = self._leaves
        optimizer = self._sae_adam()

        def run() -> Tensor:
            optimizer.zero_grad()
            loss = self._operator_loss(p.x, *leaves, p.shape.k)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Column("autograd", run)

    def _step_floor(self) -> Column:
        return self._encode_floor()

    # --- common ------------------------------------------------------------------------------------------------------

    def _usual_sparse(self) -> Column:
        """The sparse path in the forms everybody uses."""
        case = Case(self.problem, self.group, forms=dict(USUAL_FORMS), sparse=self.sparse)
        if self.group == "step":
            case._moments = self._shared_moments
        column = case.column("best")
        column.name = "sparse"
        return column

    def _copy_floor(self) -> Column:
        """A copy that moves as many bytes as the group must: half of them read, half written."""
        count = max(1, model.bytes_moved(self.group, self.problem.shape) // 8)
        source = torch.zeros(count, device=self.problem.device)
        target = torch.zeros(count, device=self.problem.device)
        return Column("floor", lambda: target.copy_(source), form="copy of the bytes")

    def _fastest(self, part: str, forms: dict[str, Callable[..., Any]], *args: Any) -> tuple[str, dict[str, float]]:
        columns = {n: Column(n, torch.no_grad()(lambda f=f: f(*args))) for n, f in forms.items()}
        return self._fastest_column(part, columns)

    def _fastest_column(self, part: str, columns: dict[str, Column]) -> tuple[str, dict[str, float]]:
        """The name of the fastest column and the seconds of each: best of CALIBRATION_ROUNDS after a warm-up, or the
        warm-up's where that is hopelessly slow already."""
        if part in self.forms:
            return self.forms[part], {}
        warm_up = {name: timed(column, self.problem.device) for name, column in columns.items()}
        hopeless = HOPELESS * min(warm_up.values())
        best = {name: seconds for name, seconds in warm_up.items() if seconds > hopeless}
        running = [name for name in columns if name not in best]
        for _ in range(CALIBRATION_ROUNDS):
            for name in running:
                best[name] = min(best.get(name, float("inf")), timed(columns[name], self.problem.device))
        self.forms[part] = min(best, key=lambda name: best[name])
        return self.forms[part], best

    def verify(self, column: Column) -> float:
        """Runs a column once and compares its result with fp64: the largest relative error. AssertionError beyond
        TOLERANCE."""
        p = self.problem
        if column.name == "floor":
            column.run(*column.prepare())
            return 0.0
        if self.group == "step":
            _ = p.gradients  # of the initial parameters
            self.reset()
            column.run(*column.prepare())
            error = self._update_error()
            self.reset()
        else:
            error = self._error(column.run(*column.prepare()))
        if not error <= TOLERANCE[self.group]:
            raise AssertionError(
                f"{column.name} is wrong: {self.group} {p.shape} differs from fp64 by {error:.2e}, "
                f"more than {TOLERANCE[self.group]:.0e}"
            )
        return error

    def _error(self, result: Any) -> float:
        p = self.problem
        if self.group == "encode":
            values, indices = result
            if not torch.equal(indices.sort(dim=1).values, p.codes[1].sort(dim=1).values):
                return float("inf")
            # A column may return its latents in any order.
            expected = torch.zeros_like(p.reference[0]).copy_(p.reference[0])
            order, expected_order = indices.argsort(dim=1), p.codes[1].argsort(dim=1)
            return relative_error(values.gather(1, order), expected.gather(1, expected_order))
        if self.group == "decode":
            return relative_error(result, p.reference[1] + p.x)
        dW_enc, db_enc, dW_dec, db_dec = result
        wanted = p.gradients
        return max(
            relative_error(dW_enc[wanted.rows], wanted.dW_enc),
            relative_error(db_enc[wanted.rows], wanted.db_enc),
            relative_error(dW_dec[wanted.rows], wanted.dW_dec),
            relative_error(db_dec, wanted.db_dec),
        )

    def _update_error(self) -> float:
        """Relative error of the first step's change of the parameters, at the checked latents. Adam's first step is the
        gradient's sign: elements of a gradient that is nothing but rounding to fp32 have none, and are left out."""
        g = self.problem.gradients
        assert self._initial is not None
        worst = 0.0
        everywhere = slice(None)
        for i, (gradient, rows) in enumerate(
            ((g.dW_enc, g.rows), (g.db_enc, g.rows), (g.dW_dec, g.rows), (g.db_dec, everywhere))
        ):
            before = self._initial[i][rows].double()
            # The first step from zero moments: both bias corrections cancel the factors 1 - beta.
            target = before - LR * gradient / (gradient.abs() + EPS)
            if i == 2:
                target /= torch.linalg.vector_norm(target, dim=1, keepdim=True)
            certain = (gradient == 0) | (gradient.abs() > SIGN_IS_ROUNDING * gradient.abs().max())
            after = self.problem.parameters[i].detach()[rows].double()
            worst = max(worst, relative_error((after - before)[certain], (target - before)[certain]))
        return worst


def timed(column: Column, device: torch.device) -> float:
    """Seconds of one call, without its preparation."""
    args = column.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    column.run(*args)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start

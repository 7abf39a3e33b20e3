"""Training state in fewer bytes: stochastic rounding to bf16, fp32 master weights in halves, and SAEAdam with them."""

from __future__ import annotations

import copy

import pytest
import torch

import refusal_kernels as rk
from refusal_kernels import compact
from refusal_kernels.backends import BACKENDS

N, D, F, K = 60, 24, 50, 4
DEAD = torch.tensor([3, 7, 41])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def words(*numbers: int) -> torch.Tensor:
    """fp32 numbers of these bit patterns."""
    return torch.tensor([n - (n >> 31 << 32) for n in numbers], dtype=torch.int32).view(torch.float32)


def sae(weights: torch.dtype) -> list[torch.Tensor]:
    """W_enc, b_enc, W_dec, b_dec that bf16 holds exactly; biases fp32."""
    tensors = [torch.randn(F, D) / 5, torch.randn(F) / 10, torch.randn(F, D) / 5, torch.randn(D) / 10]
    return [t.bfloat16().to(weights if t.dim() == 2 else torch.float32).requires_grad_() for t in tensors]


def train(parameters: list[torch.Tensor], optimizer: rk.SAEAdam, steps: int, backend: str, first: int = 0, dead=None):
    """Losses of steps on batches that their number decides, in bf16."""
    losses = []
    for number in range(first, first + steps):
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(number)).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=parameters[0].dtype == torch.float32):
            losses.append(rk.sae_step(x, *parameters, K, optimizer=optimizer, dead=dead, backend=backend).loss)
    return torch.stack(losses)


# --- the two forms ---------------------------------------------------------------------------------------------------


def test_halves_give_the_master_back_bit_for_bit():
    master = torch.cat([torch.randn(20_000) * torch.randn(20_000).exp(), words(*range(0x3F7F0000, 0x3F820000, 3))])
    master = torch.cat([master, -master, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40, 3e38])])
    high, low = compact.split(master)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(compact.join(high, low).view(torch.int32), master.view(torch.int32))
    # The upper half is the nearest bf16 number; half-way cases go away from zero instead of to even.
    half_way = master.view(torch.int32) & 0xFFFF == 0x8000
    assert half_way.any()
    assert torch.equal(high[~half_way], master[~half_way].bfloat16())
    assert (high[half_way].abs().float() >= master[half_way].abs()).all()


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF, 0x7F800001])
def test_nan_stays_nan(pattern):
    """0x7fffffff is the NaN a GPU makes: rounding it upwards would carry into the sign."""
    nan = words(pattern)
    high, low = compact.split(nan)
    assert high.isnan().all()
    assert compact.join(high, low).isnan().all()
    assert compact.to_bfloat16(nan, torch.tensor([0xFFFF])).isnan().all()


def test_stochastic_rounding_is_right_on_average_and_never_further_than_a_neighbour():
    x = torch.randn(2000).abs() + 0.1
    below = (x.view(torch.int32) & -65536).view(torch.float32)
    step = below.nextafter(torch.tensor(9.0)).view(torch.int32)  # one fp32 step: only its exponent is used
    gap = words(0x3C000000) * 2.0 ** ((step.view(torch.int32) >> 23) - 127).float()  # 2^-7 of the binade
    bits = compact.random_bits(2000 * 400, 0, compact.salt_of(5, 2), x.device).view(400, 2000)
    for own in (bits & 0xFFFF, bits >> 16):
        rounded = torch.stack([compact.to_bfloat16(x, row).float() for row in own])
        assert ((rounded == below) | (rounded == below + gap)).all()
        error = (rounded.mean(0) - x) / gap
        assert error.abs().max() < 5 * 0.5 / 20
        assert abs(error.mean()) < 0.002


def test_the_random_words_are_pinned():
    """Checkpoints and back-ends rely on them: the same numbers whatever the version."""
    assert compact.salt_of(1, 0) == SALTS[0]
    assert compact.salt_of(1000, 2) == SALTS[1]
    assert compact.random_bits(3, 5, SALTS[0], torch.device("cpu")).tolist() == WORDS


SALTS = (1297032497, 1598552608)
WORDS = [3391808905, 977343444, 3522917209]


# --- the optimiser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("dead", [None, DEAD])
def test_split_weights_take_the_steps_of_fp32_weights_under_autocast(backend, max_grad_norm, dead):
    wide = sae(torch.float32)
    split = [p.detach().clone().to(torch.bfloat16 if p.dim() == 2 else p.dtype).requires_grad_() for p in wide]
    options = {"lr": 0.01, "max_grad_norm": max_grad_norm}
    optimizers = rk.SAEAdam(*wide, **options), rk.SAEAdam(*split, **options, split_master=True)
    losses = [train(p, o, 6, backend, dead=dead) for p, o in zip((wide, split), optimizers, strict=True)]
    assert torch.equal(*losses)
    for a, b in zip(wide, split, strict=True):
        assert torch.equal(a.detach(), optimizers[1].master(b))
    assert split[0].dtype == torch.bfloat16
    assert torch.equal(split[0], wide[0].bfloat16())
    assert not torch.equal(split[0].float(), wide[0].detach()), "the lower halves would say nothing"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bf16_moments_follow_fp32_ones(backend):
    """One step from equal state: moments within a bf16 step of the fp32 ones, weights equal, because they move by the
    moments before these are rounded."""
    wide, narrow = sae(torch.float32), None
    narrow = [p.detach().clone().requires_grad_() for p in wide]
    full, rounded = rk.SAEAdam(*wide, lr=0.01), rk.SAEAdam(*narrow, lr=0.01, moment_dtype=torch.bfloat16)
    train(wide, full, 1, backend)
    train(narrow, rounded, 1, backend)
    for i, (a, b) in enumerate(zip(wide, narrow, strict=True)):
        assert torch.equal(a, b)
        for m, r in zip(full.moments(a), rounded.moments(b), strict=True):
            assert r.dtype == (torch.float32 if i % 2 else torch.bfloat16)
            assert ((r.float() - m).abs() <= 2**-7 * m.abs()).all()
            assert i % 2 or not torch.equal(r, m.bfloat16()), "rounded to nearest"


def test_the_second_moment_finds_its_level_where_rounding_to_nearest_would_stand_still():
    """beta2 = 0.999: every step moves v by less than half of what separates two bf16 numbers."""
    parameters = [torch.ones(64, 64), torch.zeros(64), torch.ones(64, 64), torch.zeros(64)]
    parameters = [p.requires_grad_() for p in parameters]
    optimizer = rk.SAEAdam(*parameters, lr=0.0, moment_dtype=torch.bfloat16, remove_parallel_grad=False, backend="cpu")
    nearest = torch.tensor(0.0, dtype=torch.bfloat16)
    for p in parameters:
        p.grad = torch.ones_like(p)
    for _ in range(3000):
        optimizer.step()
        nearest = (0.999 * nearest.float() + 0.001).bfloat16()
    expected = 1 - 0.999**3000
    v = optimizer.moments(parameters[0])[1].float()
    assert abs(v.mean() - expected) < 0.01 * expected
    assert v.std() < 0.1
    assert nearest < 0.5 * expected


@pytest.mark.parametrize("split", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(split, tmp_path):
    options = {"lr": 0.01, "moment_dtype": torch.bfloat16, "split_master": split}
    parameters = sae(torch.bfloat16 if split else torch.float32)
    optimizer = rk.SAEAdam(*parameters, **options)
    train(parameters, optimizer, 3, "cpu")
    torch.save((parameters, optimizer.state_dict()), tmp_path / "state.pt")
    twin, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = rk.SAEAdam(*twin, **options)
    resumed.load_state_dict(state)
    copied = copy.deepcopy(optimizer)
    for other, its in ((twin, resumed), (list(copied.parameters), copied)):
        reference = copy.deepcopy((parameters, optimizer))
        assert torch.equal(train(*reference, 3, "cpu", 3), train(other, its, 3, "cpu", 3))
        for a, b in zip(reference[0], other, strict=True):
            assert torch.equal(reference[1].master(a), its.master(b))


def test_state_is_converted_when_it_is_loaded_into_another_form():
    wide = sae(torch.float32)
    adam = torch.optim.Adam(wide, lr=0.01)
    for p in wide:
        p.grad = torch.randn_like(p)
    adam.step()
    narrow = [p.detach().clone().to(torch.bfloat16 if p.dim() == 2 else p.dtype).requires_grad_() for p in wide]
    optimizer = rk.SAEAdam(*narrow, moment_dtype=torch.bfloat16, split_master=True)
    optimizer.load_state_dict(adam.state_dict())
    state = optimizer.state[narrow[0]]
    assert (state["exp_avg"].dtype, state["low"].dtype) == (torch.bfloat16, torch.int16)
    assert not state["low"].any()
    assert float(state["step"]) == 1
    torch.testing.assert_close(state["exp_avg"], adam.state[wide[0]]["exp_avg"].bfloat16())
    back = rk.SAEAdam(*wide)
    back.load_state_dict(optimizer.state_dict())
    assert set(back.state[wide[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert back.moments(wide[0])[0].dtype == torch.float32


def test_bytes_of_the_state():
    parameters = sae(torch.bfloat16)
    optimizer = rk.SAEAdam(*parameters, moment_dtype=torch.bfloat16, split_master=True)
    train(parameters, optimizer, 1, "cpu")
    state = [t for t in optimizer.state[parameters[0]].values() if t.dim()]
    assert sum(t.element_size() for t in [parameters[0], *state]) == 8


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_heads_step_as_a_loop_does(backend):
    heads = [sae(torch.bfloat16) for _ in range(3)]
    stacked = [torch.stack([h[i].detach() for h in heads]).requires_grad_() for i in range(4)]
    optimizer = rk.SAEAdam(*stacked, lr=0.01, split_master=True)
    each = [rk.SAEAdam(*h, lr=0.01, split_master=True) for h in heads]
    x = torch.randn(3, N, D).bfloat16()
    for _ in range(2):
        out = rk.sae_step(x, *stacked, K, optimizer=optimizer, backend=backend)
        alone = [rk.sae_step(x[i], *heads[i], K, optimizer=each[i], backend=backend) for i in range(3)]
        assert torch.equal(out.loss, torch.stack([o.loss for o in alone]))
    for i in range(3):
        for a, b in zip(stacked, heads[i], strict=True):
            assert torch.equal(optimizer.master(a)[i], each[i].master(b))


@pytest.mark.parametrize("form", ["moments", "halves", "both"])
@pytest.mark.parametrize(("rows", "d"), [(7, 5), (130, 64), (3, 1000)])
@pytest.mark.parametrize("constraints", [(True, True), (False, False)])
def test_the_cpu_kernel_rounds_as_the_formula_does(form, rows, d, constraints):
    """Bit for bit what chunks in fp32 give: the same arithmetic between the same conversions."""
    master, g = torch.randn(rows, d), torch.randn(rows, d)
    m, v = torch.randn(rows, d), torch.rand(rows, d)
    if form != "halves":
        m, v = m.bfloat16(), v.bfloat16()
    W, low = compact.split(master) if form != "moments" else (master, None)
    numbers = (0.01, 0.9, 0.999, 1e-8, 0.1, 0.001, None, *constraints, 12345)
    results = []
    assert BACKENDS["cpu"].primitive("adam_compact_rows") is not None
    for step in (BACKENDS["cpu"].adam_compact_rows, super(type(BACKENDS["cpu"]), BACKENDS["cpu"]).adam_compact_rows):
        tensors = [None if t is None else t.clone() for t in (W, low, g, m, v)]
        step(*tensors, *numbers)
        results.append(tensors)
    for a, b in zip(*results, strict=True):
        assert (a is b is None) or torch.equal(a, b)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (torch.float32, {"split_master": True}, "split_master needs W_enc and W_dec of torch.bfloat16"),
        (torch.bfloat16, {"split_master": 1}, "split_master must be True or False; got int 1"),
        (torch.bfloat16, {"moment_dtype": torch.bfloat16}, "moment_dtype needs W_enc and W_dec of torch.float32"),
        (torch.float32, {"moment_dtype": torch.float16}, "moment_dtype must be torch.float32, torch.bfloat16 or None"),
        (torch.float32, {"moment_dtype": "bf16"}, "moment_dtype must be .* or None; got 'bf16'"),
    ],
)  # fmt: skip
def test_bad_options_are_named(weights, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        rk.SAEAdam(*sae(weights), **options)

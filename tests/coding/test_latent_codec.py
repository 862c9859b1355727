"""The latent codec against closed forms: entropies, exact Jacobians, the error it announces."""

import math
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from latentvae.coding.latent_codec import (
    LatentPrior,
    channel_gains,
    channel_steps,
    decode_latent,
    encode_latent,
)
from latentvae.errors import UserError

WRITTEN = "4c565a017a6e89dd10020204808080f8030120e8030800018080800202fdff1f0a000761328c074f3df719"
READ = """
import pathlib, sys, torch
from latentvae.coding.latent_codec import decode_latent
torch.save(decode_latent(pathlib.Path(sys.argv[1]).read_bytes()), sys.argv[2])
"""


def prior_of(location: list[float], scale: list[float], gaussian: list[bool]) -> LatentPrior:
    return LatentPrior(
        torch.tensor(location).double(), torch.tensor(scale).double(), torch.tensor(gaussian)
    )


def laplace(*shape: int, seed: int = 0) -> Tensor:
    """Of scale 1, from its quantile function."""
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def content() -> bytes:
    z = normal(4, 6, 5)
    steps = torch.tensor([0.1, 0.5, math.inf, 4.0])
    return encode_latent(z, prior=LatentPrior.fit(normal(4, 1000, seed=1)), steps=steps)


def test_fit_finds_family_and_parameters() -> None:
    samples = torch.stack([3 * laplace(20_000) + 5, 2 * normal(20_000).double() - 7])
    prior = LatentPrior.fit(samples)
    assert prior.gaussian.tolist() == [False, True]
    torch.testing.assert_close(prior.location, torch.tensor([5.0, -7.0]).double(), atol=0.1, rtol=0)
    torch.testing.assert_close(prior.scale, torch.tensor([3.0, 2.0]).double(), atol=0, rtol=0.02)


def test_fit_gives_a_dead_channel_a_scale() -> None:
    prior = LatentPrior.fit(torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]))
    assert prior.location.tolist() == [2.0, 0.0]
    assert (prior.scale > 0).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip_is_within_half_a_step(data: st.DataObject) -> None:
    d = data.draw(st.integers(1, 5))
    size = [d, data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))]
    exponents = st.lists(st.floats(-6, 4), min_size=d, max_size=d)
    steps = 2 ** torch.tensor(data.draw(exponents), dtype=torch.float64)
    scale = 2 ** torch.tensor(data.draw(exponents), dtype=torch.float64)
    location = torch.tensor(data.draw(st.lists(st.floats(-50, 50), min_size=d, max_size=d)))
    gaussian = torch.tensor(data.draw(st.lists(st.booleans(), min_size=d, max_size=d)))
    prior = LatentPrior(location.double(), scale, gaussian)
    z = laplace(*size, seed=data.draw(st.integers(0, 99))) * scale.view(d, 1, 1) + 1
    content = encode_latent(z, prior=prior, steps=steps)
    error = (decode_latent(content) - z).abs().flatten(1).amax(dim=1)
    # A file keeps steps to half a sixteenth of an octave; float32 rounds the result.
    assert (error <= steps / 2 * 2 ** (1 / 32) + 1e-5 * z.abs().max()).all()
    # Encoding what was decoded changes nothing.
    assert encode_latent(decode_latent(content), prior=prior, steps=steps) == content


def test_a_file_of_an_earlier_process_is_read() -> None:
    """Symbols -3..4 of step 0.5 about 0.25, under a Gaussian; 7 of step 2, constant."""
    z = torch.stack([torch.arange(-3, 5) / 2 + 0.25, torch.full((8,), 14.0)]).view(2, 2, 4)
    prior = prior_of([0.25, 0.0], [1.0, 2.0], [True, False])
    assert decode_latent(bytes.fromhex(WRITTEN)).tolist() == z.tolist()
    steps = torch.tensor([0.5, 2.0])
    assert encode_latent(z, prior=prior, steps=steps).hex() == WRITTEN


@pytest.mark.slow
def test_equals_the_encoders_latent_in_a_fresh_process(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "z.lvz").write_bytes(content)
    paths = [str(tmp_path / name) for name in ("z.lvz", "z.pt")]
    subprocess.run([sys.executable, "-c", READ, *paths], check=True)
    assert torch.equal(torch.load(paths[1]), decode_latent(content))


@pytest.mark.parametrize("scale", [0.03, 1.0, 40.0])
@pytest.mark.parametrize("step", [1 / 64, 1 / 8])
def test_fine_steps_cost_the_entropy(scale: float, step: float) -> None:
    """h(X) - log2(step): log2(2 e b) of a Laplace, log2(2 pi e s^2) / 2 of a Gaussian."""
    z = torch.stack([laplace(150, 150) * scale, normal(150, 150).double() * scale]) + 3
    prior = prior_of([3.0, 3.0], [scale, scale], [False, True])
    steps = torch.full((2,), step * scale)
    ideal = math.log2(2 * math.e / step) + math.log2(2 * math.pi * math.e / step**2) / 2
    bits = 8 * len(encode_latent(z, prior=prior, steps=steps)) / 150**2
    assert bits == pytest.approx(ideal, rel=0.01)


def test_coarse_steps_cost_the_entropy_of_the_symbols() -> None:
    """Step 4 b: P(0) = 1 - e^-2, P(+-k) = e^-2 (1 - e^-4) e^(-4 (k - 1)) / 2."""
    p = [1 - math.exp(-2)]
    p += [math.exp(-2 - 4 * (k // 2)) * -math.expm1(-4) / 2 for k in range(20)]
    ideal = -sum(x * math.log2(x) for x in p)
    content = encode_latent(
        laplace(1, 300, 300), prior=prior_of([0.0], [1.0], [False]), steps=torch.tensor([4.0])
    )
    assert 8 * len(content) / 300**2 == pytest.approx(ideal, rel=0.02)


def test_dead_channels_cost_no_payload() -> None:
    """One is constant, one is not seen by the decoder: bits do not grow with the image."""

    def size(side: int) -> int:
        z = torch.stack([torch.full((side, side), 2.5), 100 * normal(side, side)])
        prior = prior_of([2.5, -1.0], [1e-6, 100.0], [False, True])
        content = encode_latent(z, prior=prior, steps=torch.tensor([0.1, math.inf]))
        dead, unseen = decode_latent(content)
        assert (dead - 2.5).abs().max() < 0.1 / 200
        assert (unseen + 1).abs().max() < 100 / 15
        return len(content)

    assert size(100) == size(10) < 60


def test_header_is_a_few_bytes_a_channel() -> None:
    """128 channels of different widths whose symbols are all 0."""
    prior = LatentPrior.fit(normal(128, 500) * torch.linspace(0.5, 3, 128)[:, None] + 0.3)
    z = prior.location.view(128, 1, 1).expand(128, 2, 2)
    content = encode_latent(z, prior=prior, steps=torch.linspace(1, 2, 128))
    assert len(content) < 50 + 3 * 128


def test_a_channel_far_from_its_prior_is_exact_and_bounded() -> None:
    """At most 24 bits a symbol, whatever was expected."""
    z = normal(1, 50, 50) * 1000 + 500
    prior = prior_of([0.0], [1e-9], [True])
    content = encode_latent(z, prior=prior, steps=torch.tensor([1.0]))
    assert (decode_latent(content) - z).abs().max() <= 0.51
    assert 8 * len(content) <= 24.1 * 50**2 + 500


@pytest.mark.parametrize("where", ["head", "middle", "end"])
def test_damage_is_noticed(content: bytes, where: str) -> None:
    position = {"head": 9, "middle": len(content) // 2, "end": len(content) - 1}[where]
    flipped = bytearray(content)
    flipped[position] ^= 4
    for wrong in (bytes(flipped), content[:position], content + b"\0\0\0\0"):
        with pytest.raises(UserError, match="damaged"):
            decode_latent(wrong)


def test_other_files_are_refused(content: bytes) -> None:
    for wrong in (b"", b"\x89PNG\r\n\x1a\n" + content, b"LVT\x01" + content[4:]):
        with pytest.raises(UserError, match="must start with"):
            decode_latent(wrong)
    for wrong in (b"LVZ", b"LVZ\x02" + content[4:]):
        with pytest.raises(UserError, match="version 1"):
            decode_latent(wrong)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10_000), values=st.binary(min_size=1, max_size=8))
def test_a_forged_file_is_decoded_or_refused(position: int, values: bytes) -> None:
    """With the right checksum: any header and any payload, but never a crash."""
    prior = prior_of([0.0, 1.0], [1.0, 2.0], [True, False])
    body = bytearray(encode_latent(normal(2, 5, 5), prior=prior, steps=torch.ones(2))[8:])
    start = position % len(body)
    body[start : start + len(values)] = values
    content = b"LVZ\x01" + zlib.crc32(body).to_bytes(4, "little") + body
    try:
        assert decode_latent(content).isfinite().all()
    except UserError as error:
        assert "damaged" in str(error)


def test_wrong_latents_are_refused() -> None:
    z, prior, steps = torch.zeros(1, 2, 2), prior_of([0.0], [1.0], [False]), torch.ones(1)
    with pytest.raises(ValueError, match="not finite"):
        encode_latent(torch.full((1, 2, 2), math.nan), prior=prior, steps=steps)
    with pytest.raises(ValueError, match=r"\(d, h, w\)"):
        encode_latent(z[None], prior=prior, steps=steps)
    with pytest.raises(ValueError, match="steps must be at least"):
        encode_latent(z, prior=prior, steps=torch.tensor([0.0]))
    with pytest.raises(UserError, match="step of channel 0 is too fine"):
        encode_latent(z + 1, prior=prior, steps=torch.tensor([1e-6]))
    with pytest.raises(UserError, match="step of channel 0 is too fine"):
        wide = prior_of([1e9], [1.0], [False])
        encode_latent(z + 1e9, prior=wide, steps=torch.ones(1))
    with pytest.raises(ValueError, match="not finite"):
        LatentPrior.fit(torch.tensor([[math.inf, 0.0]]))


@pytest.fixture
def decoder() -> nn.ConvTranspose2d:
    """Linear, f = 2, frozen; channel 1 is ignored, the others differ by far."""
    decoder = nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1).requires_grad_(False)
    decoder.weight *= torch.tensor([1.0, 0.0, 0.1, 5.0]).view(4, 1, 1, 1)
    return decoder


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gains_equal_the_exact_jacobians(decoder: nn.ConvTranspose2d, mode: type) -> None:
    z = normal(1, 4, 6, 5)
    jacobian = torch.autograd.functional.jacobian(decoder, z)
    assert isinstance(jacobian, Tensor)
    exact = jacobian.square().sum(dim=(0, 1, 2, 3)).mean(dim=(-2, -1)).double()[0]
    with mode():
        gains = channel_gains(decoder, z, probes=200)
    torch.testing.assert_close(gains, exact, rtol=0.05, atol=0)
    assert gains[1] == 0


def test_gains_look_at_the_middle_of_a_large_latent(decoder: nn.ConvTranspose2d) -> None:
    sizes = []

    def watched(z: Tensor) -> Tensor:
        sizes.append((z.shape[2:], z[0, 0, 0, 0].item()))
        return decoder(z)

    z = torch.arange(40.0).view(1, 1, 1, 40).expand(1, 4, 3, 40)
    channel_gains(watched, z, probes=1, max_side=8)
    assert sizes == [((3, 8), 16.0)]


def test_the_noise_is_the_one_announced(decoder: nn.ConvTranspose2d) -> None:
    z = normal(1, 4, 64, 64)
    steps = channel_steps(channel_gains(decoder, z, max_side=64), noise_psnr=45.0, f=2)
    assert steps[1] == math.inf
    content = encode_latent(z[0], prior=LatentPrior.fit(normal(4, 5000, seed=1)), steps=steps)
    error = decoder(decode_latent(content)[None]) - decoder(z)
    assert 10 * math.log10(4 / error.square().mean().item()) == pytest.approx(45.0, abs=0.2)


def test_steps_share_the_error_equally() -> None:
    gains = torch.tensor([4.0, 1.0, 0.0, 0.25])
    steps = channel_steps(gains, noise_psnr=20.0, f=8)
    torch.testing.assert_close(steps[:2] * 2, steps[[1, 3]])
    error = gains[[0, 1, 3]].double() * steps[[0, 1, 3]].square() / 12
    assert error.sum().item() / (3 * 8**2) == pytest.approx(4 / 100)
    assert steps[2] == math.inf
    assert channel_steps(torch.zeros(2), noise_psnr=20.0, f=8).tolist() == [math.inf] * 2
    with pytest.raises(ValueError, match="gains must be finite"):
        channel_steps(torch.tensor([math.nan]), noise_psnr=20.0, f=8)


def test_a_decoder_that_sees_nothing_costs_only_the_header() -> None:
    prior = LatentPrior.fit(normal(3, 100))
    content = encode_latent(normal(3, 9, 9), prior=prior, steps=torch.full((3,), math.inf))
    decoded = decode_latent(content)
    torch.testing.assert_close(decoded.mean((1, 2)).double(), prior.location, atol=0.1, rtol=0)
    assert len(content) < 50

"""Times and memory of a network that sleeps and allocates as told."""

import time
from mmap import mmap
from typing import Any

import psutil
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.evaluation import speed
from latentvae.evaluation.speed import measure_speed


@pytest.fixture(autouse=True)
def quick(quick_speed: None) -> None:
    """All tests here: what they measure sleeps."""


class Sleeper(ModelMixin, ConfigMixin):
    """f 8. Encoding 64 x 64 pixels takes `seconds` and `mib`, larger images more; decoding no time.

    `broken_from`: pixels a side from which decoding runs out of memory.
    """

    @register_to_config
    def __init__(
        self, seconds: float = 0.0, mib: float = 0.0, broken_from: int = 10**6, error: str = ""
    ) -> None:
        super().__init__()
        self.sides: list[tuple[int, int]] = []
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, images: Tensor) -> AutoencoderTinyOutput:
        self.sides.append(tuple(images.shape[1:3]))
        share = images.shape[2] * images.shape[3] / 64**2
        # Straight from the system: what the heap still holds differs between machines.
        mib = int(self.config["mib"] * share)
        held = mmap(-1, max(mib, 1) * speed.MIB)
        for _ in range(mib):
            held.write(b"." * speed.MIB)
        time.sleep(self.config["seconds"] * share)
        held.close()
        return AutoencoderTinyOutput(latents=F.avg_pool2d(images, 8))

    def decode(self, z: Tensor) -> DecoderOutput:
        if z.shape[3] * 8 >= self.config["broken_from"]:
            raise RuntimeError(self.config["error"])
        return DecoderOutput(sample=F.interpolate(z, scale_factor=8))


def measure(net: Sleeper, *sizes: int, **options: Any) -> dict[tuple[str, int], dict[str, Any]]:
    points = measure_speed(net.eval(), sizes=sizes, f=8, **options)["points"]
    return {(point["call"], point["size"]): point for point in points}


def test_says_how_it_was_measured() -> None:
    net = Sleeper()
    result = measure_speed(net, sizes=(60, 64, 3), f=8, in_channels=4)
    assert result["device"] == "cpu"
    assert result["dtype"] == "float32"
    assert result["num_threads"] == torch.get_num_threads()
    points = [(point["call"], point["size"]) for point in result["points"]]
    assert points == [(call, size) for call in ("encode", "decode") for size in (8, 64)]
    assert set(net.sides) == {(4, 8), (4, 64)}
    assert all("skipped" not in point for point in result["points"])


def test_images_per_second() -> None:
    points = measure(Sleeper(seconds=0.02), 64, 128)
    assert 10 < points["encode", 64]["images_per_second"] <= 50
    assert 4 < points["encode", 128]["images_per_second"] <= 12.5
    assert points["decode", 64]["images_per_second"] > 50
    assert [points["encode", size]["runs"] for size in (64, 128)] == [3, 3]


def test_peak_memory_grows_with_the_pixels() -> None:
    points = measure(Sleeper(seconds=0.01, mib=32), 64, 128)
    assert points["encode", 64]["peak_mib"] == pytest.approx(32, abs=4)
    assert points["encode", 128]["peak_mib"] == pytest.approx(128, abs=4)
    assert points["decode", 64]["peak_mib"] < 4


def test_a_size_above_the_budget_is_skipped() -> None:
    net = Sleeper(seconds=0.05)
    points = measure(net, 64, 128, 256, 512, budget_s=0.5)
    assert points["encode", 128]["runs"] == 1  # 0.2 s each: three would be above
    for size, seconds in ((256, 1), (512, 3)):
        prefix, about, unit = points["encode", size]["skipped"].rsplit(" ", 2)
        assert (prefix, unit) == ("would take about", "s")
        assert int(about) >= seconds
    assert "images_per_second" not in points["encode", 256]
    assert points["decode", 512]["images_per_second"] > 1
    assert max(net.sides) == (3, 128)


def test_a_size_above_the_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = psutil.virtual_memory()
    few = real._replace(available=64 * speed.MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: few)
    points = measure(Sleeper(seconds=0.01, mib=32), 64, 128)
    assert points["encode", 128]["skipped"] == "would need about 0.1 GiB of memory"


def test_out_of_memory_is_said_and_other_errors_are_not_hidden() -> None:
    full = Sleeper(broken_from=128, error="DefaultCPUAllocator: can't allocate memory: 1 bytes")
    points = measure(full, 64, 128)
    assert points["decode", 128] == {
        "call": "decode",
        "size": 128,
        "runs": 0,
        "skipped": "out of memory",
    }
    with pytest.raises(RuntimeError, match="shapes"):
        measure(Sleeper(broken_from=128, error="shapes do not fit"), 64, 128)

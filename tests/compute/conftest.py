"""The convolutions of a processor with AVX-512, whatever runs the tests."""

import pytest

from latentvae.compute.winograd import convolutions


@pytest.fixture(autouse=True)
def limits_of_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "LIMITS", convolutions.limits_of("AVX512"))

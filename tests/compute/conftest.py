"""Use the limits of a processor with AVX-512 on every machine."""

import pytest

from latentvae.compute.winograd import convolutions


@pytest.fixture(autouse=True)
def limits_of_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "LIMITS", convolutions.limits_of("AVX512"))

"""The comparison of quantisers: short arms on the sample photos, and that both have one start."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from latentvae.bottlenecks import build_quantizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))  # where it finds quantizer_pairs.py, as when it is run
    spec = importlib.util.spec_from_file_location(
        "benchmark_tokenizer_quality", BENCHMARKS / "tokenizer_quality.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the option parser reads the source through it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def command(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    options = ["--data", "samples", "--validation_data", "samples", "--resolution", "32"]
    options += ["--channels", "8", "--batch_size", "2", "--updates", "2", "--speed_updates", "1"]
    monkeypatch.setattr("sys.argv", ["tokenizer_quality.py", *options, *map(str, arguments)])
    script.main()


def test_two_quantisers_with_both_arms_and_none_twice(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "quality.json"
    command(script, monkeypatch, "--json", file, "--quantizers", "fsq", "--seeds", "0")
    first = json.loads(file.read_text())["runs"]
    both = ["--quantizers", "fsq", "residual", "--seeds", "0"]
    command(script, monkeypatch, "--json", file, *both)
    result = json.loads(file.read_text())
    names = [f"{name}/0/{arm}" for name in ("fsq", "residual") for arm in ("ours", "theirs")]
    assert list(result["runs"]) == names
    assert {name: result["runs"][name] for name in first} == first
    fsq = [row for row in result["rows"] if row["quantizer"] == "fsq"]
    assert [row["metric"] for row in fsq] == ["psnr", "lpips_alex", "usage", "perplexity"]
    for row in fsq[:2]:  # the same mathematics from the same start
        assert row["ours"] == pytest.approx(row["theirs"], rel=1e-3)
    assert "s/update" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command(script, monkeypatch, "--json", file, *both, "--updates", "3")
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vq", "ema", "l2", "fsq", "lfq", "residual", "simvq"])
def test_ours_and_theirs_are_the_same_at_the_same_codes(script: ModuleType, name: str) -> None:
    """z, the weighted losses, indices (but for the order of bits) and gradients (but for theirs of
    residual levels, which pass the decoder's once per level)."""
    torch.manual_seed(0)
    kind = script.KINDS[name]
    ours = build_quantizer(**kind.ours)
    theirs = script.Theirs(kind.theirs(0.0), ours)
    kind.start_alike(ours, theirs.module)

    # inputs, and the same codes in both
    features = torch.randn(2, ours.in_channels, 4, 4)
    if "num_codes" in kind.ours and name != "simvq":
        theirs.initialise(features.movedim(1, -1).flatten(0, -2), generator=torch.Generator())
        modules = getattr(theirs.module, "layers", [theirs.module])
        for level, module in zip(getattr(ours, "levels", [ours]), modules, strict=True):
            level.weight.data.copy_(module.codebook.data)

    # results and gradients of both
    found, expected = [], []
    for quantiser, results in ((ours, found), (theirs, expected)):
        own = features.clone().requires_grad_()
        out = quantiser(own)
        loss = sum(({"theirs": 1.0} | kind.weights)[k] * v for k, v in out.losses.items())
        results += [out.z, torch.as_tensor(loss), out.indices]
        (out.z.square().sum() + loss).backward()
        results.append(own.grad)

    # compare
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    if name != "lfq":  # its highest bit is their lowest
        assert torch.equal(found[2], expected[2])
    if name == "residual":  # of two levels; the decoder's gradient is 2 z
        torch.testing.assert_close(expected[3] - found[3], 2 * found[0].detach())
    else:
        torch.testing.assert_close(found[3], expected[3], rtol=1e-4, atol=1e-5)

"""A proof puts a code above its controls, keeps what is done, and names wrong input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.cli.main import main
from latentvae.errors import UserError
from latentvae.latents.encode import encode_folder
from latentvae.metrics.distribution import KernelDistance, unbiased_mmd
from latentvae.proofs.generator_proof import ProofSettings, prove
from latentvae.proofs.generator_proof.latent_subject import LatentSubject
from latentvae.proofs.generator_proof.measures import References, class_share, nearest
from latentvae.proofs.generator_proof.token_subject import TokenSubject
from tests.tiny import kl, spread_vq

pytestmark = pytest.mark.usefixtures("own_accelerate")
SHORT = [
    "--updates",
    "2",
    "--batch_size",
    "8",
    "--width",
    "32",
    "--depth",
    "1",
    "--samples",
    "6",
    "--seeds",
    "0",
    "1",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures of 16 px: light ones in the class day, dark ones in the class night."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(40):
        draws = np.random.default_rng(index)
        level = 170 if index % 2 else 40
        pixels = level + draws.integers(-30, 30, (16, 16, 3))
        path = folder / ("day" if index % 2 else "night") / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def latents(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latents")
    kl(latent_channels=4).save_pretrained(root / "autoencoder")
    encode_folder(root / "autoencoder", photos, root / "latents", resolution=16)
    return root / "latents"


@pytest.fixture(scope="module")
def tokens(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokens")
    spread_vq().save_pretrained(root / "tokenizer")
    encode_folder(root / "tokenizer", photos, root / "tokens", resolution=16)
    return root / "tokens"


def test_the_kernel_distance_is_unbiased_and_agrees_for_pairs() -> None:
    draws = torch.Generator().manual_seed(0)
    same = [
        unbiased_mmd(torch.randn(20, 8, generator=draws), torch.randn(30, 8, generator=draws))
        for _ in range(300)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    x, y = torch.randn(200, 8, generator=draws), 1 + torch.randn(200, 8, generator=draws)
    assert unbiased_mmd(x, y) > 0.5

    # for independent pairs, the estimate of `KernelDistance` differs only in k(x_i, y_i)
    pairs = KernelDistance()
    pairs.update(x, y)
    assert unbiased_mmd(x, y) == pytest.approx(pairs.result(), rel=0.02)


def test_classes_and_copies_are_recognised() -> None:
    draws = torch.Generator().manual_seed(0)
    classes = torch.arange(60) % 2
    train = classes[:, None] * 4.0 + torch.randn(60, 5, generator=draws)
    assert class_share(train, classes, train, classes) > 0.95
    assert class_share(train, 1 - classes, train, classes) < 0.05

    held = classes[:, None] * 4.0 + torch.randn(60, 5, generator=draws)
    references = References(train, held, train, held, classes)
    copies = references.measure(train + 1e-3, classes)
    honest = references.measure(held, classes)
    assert copies["copies"] == 1.0
    assert honest["copies"] <= 0.02
    assert copies["near_train"] < 0.1 < copies["near_held"]
    assert nearest(train[:3], train).max() < 0.05  # cdist rounds


def test_controls_of_latents_change_what_they_say(latents: Path) -> None:
    subject = LatentSubject(latents, ProofSettings(noise=0.5), name="latents")
    code, noise = subject.data("code"), subject.data("noise")
    z = code.train.z
    added = noise.train.z - z
    relative = added.std(dim=(0, 2, 3)) / z.std(dim=(0, 2, 3))
    torch.testing.assert_close(relative, torch.full((4,), 0.5), atol=0.05, rtol=0)

    # shuffled classes keep the latents, and the held-out images keep their classes
    labels = subject.data("labels")
    assert torch.equal(labels.train.z, z)
    assert not torch.equal(labels.train.classes, code.train.classes)
    assert torch.equal(labels.train.classes.bincount(), code.train.classes.bincount())
    assert torch.equal(labels.validation.classes, code.validation.classes)

    # permuted latents decode to the same pictures
    permuted = subject.data("permuted")
    assert not torch.equal(permuted.train.z, z)
    ours, theirs = (
        subject.decode(name, data.train.z[:4])
        for name, data in (("code", code), ("permuted", permuted))
    )
    torch.testing.assert_close(ours, theirs)

    # blocks: 4 channels hold one RGB colour for each position
    blocks = subject.data("blocks")
    assert blocks.shape == (3, *code.shape[1:])
    images = subject.decode("blocks", blocks.train.z)
    assert (images - subject.train.images).abs().mean() < 0.2
    assert not set(subject.train.names) & set(subject.held.names)


def test_controls_fit_the_patches_and_the_classes(
    latents: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # permuted latents keep the patches that are the generator's tokens
    from latentvae.proofs.generator_proof import latent_subject

    monkeypatch.setattr(latent_subject, "patch_for", lambda side: 2)
    subject = LatentSubject(latents, ProofSettings(samples=7), name="latents")
    z = torch.arange(64.0).view(1, 1, 8, 8)
    moved = subject._moved(z, subject._order)
    cells = {tuple(z[0, 0, y : y + 2, x : x + 2].flatten().tolist())
             for y in range(0, 8, 2) for x in range(0, 8, 2)}  # fmt: skip
    for y in range(0, 8, 2):
        for x in range(0, 8, 2):
            assert tuple(moved[0, 0, y : y + 2, x : x + 2].flatten().tolist()) in cells
    torch.testing.assert_close(subject._moved(moved, torch.argsort(subject._order)), z)

    # samples have the classes of the data, and for their recognition all classes equally often
    assert subject.even_classes().tolist() == [0, 1, 0, 1, 0, 1, 0]
    share = subject.train.classes.double().mean().item()
    assert subject.own_classes().double().mean().item() == pytest.approx(share, abs=0.1)

    # without classes, nothing can be shuffled
    (tmp_path / "flat").mkdir()
    for path in photos.rglob("*.png"):
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
    encode_folder(latents.parent / "autoencoder", tmp_path / "flat", tmp_path / "z", resolution=16)
    few = ProofSettings(updates=1, depth=1, width=32, samples=4, batch_size=8, seeds=(0,),
                        shifts=(1.0,))  # fmt: skip
    found = prove([tmp_path / "z"], tmp_path / "out", settings=few, controls=["labels"])
    assert found["controls"]["z"] == {}
    assert "class_accuracy" not in found["latents"]["z"]


def test_controls_of_tokens_change_what_they_say(tokens: Path) -> None:
    subject = TokenSubject(tokens, ProofSettings(noise=0.25), name="tokens")
    code = subject.data("code").train.sequences.long()
    changed = (subject.data("noise").train.sequences != code).double().mean()
    assert changed.item() == pytest.approx(0.25, abs=0.05)
    shuffled = subject.data("shuffled").train.sequences.long()
    assert torch.equal(shuffled.sort(dim=1).values, code.sort(dim=1).values)
    permuted = subject.data("permuted").train.sequences
    torch.testing.assert_close(
        subject.decode("permuted", permuted[:2]), subject.decode("code", code[:2])
    )


@pytest.fixture(scope="module")
def command(latents: Path, tokens: Path) -> list[str]:
    """The command of a short proof, without `--out`."""
    return [
        "prove",
        str(latents),
        str(tokens),
        *SHORT,
        "--shifts",
        "1",
        "2",
        "--controls",
        "labels",
    ]


@pytest.fixture(scope="module")
def proved(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short proof."""
    out = tmp_path_factory.mktemp("proof") / "proof"
    main([*command, "--out", str(out)])
    return out


def test_the_command_proves_latents_and_tokens(
    proved: Path,
    command: list[str],
    latents: Path,
    tokens: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = (proved / "proof.json").read_bytes()
    proof = json.loads(first)
    assert set(proof["latents"]) == {"latents", "tokens"}
    assert set(proof["controls"]["tokens"]) == {"labels"}
    for name in ("latents", "tokens"):
        row = proof["latents"][name]
        assert set(row["kd"]["seeds"]) == {"0", "1"}
        assert 0 <= row["class_accuracy"] <= 1
        assert proof["floors"][name]["untrained"]["kd"] > proof["floors"][name]["real"]["kd"]
    assert "bits_per_token" in proof["latents"]["tokens"]
    assert proof["latents"]["latents"]["shift"] in (1, 2)
    page = (proved / "proof.html").read_text()
    assert "for this generator on this data" in page
    assert "better for generation" not in page

    # the same command trains nothing again
    capsys.readouterr()
    main([*command, "--out", str(proved)])
    assert "seed 0" not in capsys.readouterr().out
    assert (proved / "proof.json").read_bytes() == first

    # other settings need another folder
    with pytest.raises(UserError, match=r"holds a proof with updates 2 \(now 3\)"):
        prove([latents, tokens], proved, settings=ProofSettings(updates=3, batch_size=8))


@pytest.mark.slow
def test_the_same_seeds_give_the_same_bytes(
    proved: Path, command: list[str], tmp_path: Path
) -> None:
    main([*command, "--out", str(tmp_path / "again")])
    again = (tmp_path / "again" / "proof.json").read_bytes()
    assert again == (proved / "proof.json").read_bytes()


def test_wrong_input_is_named(latents: Path, photos: Path, tmp_path: Path) -> None:
    for arguments, named in (
        ({"width": 33}, "width must be a multiple of 32"),
        ({"seeds": (0, 0)}, "seeds must be different"),
        ({"shifts": (0.0,)}, "shifts must be above 0"),
    ):
        with pytest.raises(UserError, match=named):
            ProofSettings(**arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no control 'noize' for latents"):
        prove([latents], tmp_path / "proof", controls=["noize"])
    with pytest.raises(UserError, match=r"lacks .* of .* images"):
        prove([latents], tmp_path / "proof", data=str(photos / "day"))
    with pytest.raises(UserError, match="batch_size 64 is larger than"):
        prove([latents], tmp_path / "proof")
    with pytest.raises(UserError, match="2 models for 1 folders"):
        prove([latents], tmp_path / "proof", models=["a", "b"])

    # another resolution cannot be compared
    model = latents.parent / "autoencoder"
    encode_folder(model, photos, tmp_path / "small", resolution=8)
    few = ProofSettings(batch_size=8)
    with pytest.raises(UserError, match="has other resolution than"):
        prove([latents, tmp_path / "small"], tmp_path / "proof", settings=few)
    assert not (tmp_path / "proof").exists()

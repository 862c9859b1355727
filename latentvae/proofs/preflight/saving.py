"""Check the work between updates: validation, and saving and restoring a checkpoint."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from latentvae.data import BadImages, Batch
from latentvae.distributed import barrier, from_main, is_main, world_size
from latentvae.engine.checkpoint_content import restore, take_snapshot
from latentvae.engine.checkpoint_files import PREFIX, load_checkpoint, save_checkpoint
from latentvae.engine.training import Training
from latentvae.engine.updates import Updates
from latentvae.proofs.checks import Check
from latentvae.proofs.preflight.rehearsal import Rehearsal, align, fingerprints
from latentvae.tasks.autoencoder.images import eval_transform
from latentvae.tasks.autoencoder.validate import readable_images, validate

VALIDATION_IMAGES = 8
GPU_TOLERANCE = 1e-2  # allowed relative error of a loss: sums on GPUs have no fixed order


def checks(rehearsal: Rehearsal) -> Iterator[Check]:
    """Yield the checks of image range, validation and checkpoint."""
    yield image_range(rehearsal)
    yield _or_what_it_raised("validation", validation, rehearsal)
    yield _or_what_it_raised("checkpoint", checkpoint, rehearsal)


def _or_what_it_raised(
    name: str, check: Callable[[Rehearsal], Check], rehearsal: Rehearsal
) -> Check:
    """Make a check, or report its exception as a failed check.

    Without this check, the exception would end the run hours after its start. With several
    processes, the exception is not caught, and ends the preflight.
    """
    try:
        return check(rehearsal)
    except (OSError, RuntimeError, TypeError, ValueError, LookupError) as error:
        if world_size() > 1:  # other ranks may wait for this one, so the launcher ends them all
            raise
        return Check(
            name=name,
            passed=False,
            value=f"{type(error).__name__}: {error}".splitlines()[0],
            expected="no exception",
            advice="The run would end with this exception, some time after its start.",
        )


def image_range(rehearsal: Rehearsal) -> Check:
    """Check that training and validation images are in [-1, 1], and not only one set in [0, 1].

    With images in [0, 1], the values of LPIPS and of every metric would be wrong.
    """
    # ranges
    train = (
        min(low for _, low, _ in rehearsal.batches),
        max(high for _, _, high in rehearsal.batches),
    )
    images = readable_images(
        rehearsal.task.validation_images, eval_transform(rehearsal.task.config), count=4
    )
    shown = (images.min().item(), images.max().item())

    # verdict
    inside = all(low >= -1 and high <= 1 for low, high in (train, shown))
    return Check(
        name="image-range",
        # Bright pictures may have no negative values. In that case, both sets of images must have
        # none.
        passed=inside and (train[0] < 0) == (shown[0] < 0),
        value=f"pixels {train[0]:.2f} to {train[1]:.2f} in training, {shown[0]:.2f} to "
        f"{shown[1]:.2f} in validation",
        expected="training and validation images in [-1, 1], and not only one of them in [0, 1]",
        advice="Scale training and validation images to [-1, 1] in the same way. For files with "
        "floating-point values, give --value_range.",
    )


def validation(rehearsal: Rehearsal) -> Check:
    """Check that a validation works. A failure would end the run hours after its start."""
    task, bad = rehearsal.task, BadImages()
    limit = min(VALIDATION_IMAGES * world_size(), len(task.validation_images))

    # validate
    start = time.perf_counter()
    with rehearsal.training.evaluating():
        values = validate(
            task.net,
            task.validation_images,
            transform=eval_transform(task.config),
            perceptual=task.metric,
            batch_size=task.config.run.eval_batch_size,
            limit=limit,
            device=task.accelerator.device,
            bad=bad,
        )
    rehearsal.validation_seconds = (time.perf_counter() - start) / max(limit, 1)

    # verdict
    shown = ("psnr", "ssim", "lpips", "images")
    return Check(
        name="validation",
        passed=all(math.isfinite(value) for value in values.values()),
        value=", ".join(f"{name} {values[f'validation/{name}']:.3g}" for name in shown),
        expected="finite numbers from unseen images",
        advice="Look at the validation images and at --validation_data_dir.",
    )


def checkpoint(rehearsal: Rehearsal) -> Check:
    """Check that the next update has the same result before and after a checkpoint is restored.

    The results differ if something is not restored, such as an optimizer or the order of the
    images.
    """
    # save, then the next update
    training = rehearsal.training
    align(training)
    before = fingerprints(training)
    path = _save(rehearsal)
    expected = _next_update(training, rehearsal.source)
    after = fingerprints(training)

    # restore
    for learner in training.task.learners.values():
        learner.optimizer.state.clear()  # as at the start of a resume
    restore(training, load_checkpoint(path))
    restored = fingerprints(training)
    wrong = [name for name in before if before[name] != restored.get(name)]

    # the same update again
    batches = training.task.batches(start_step=training.progress.micro_step)
    found = _next_update(training, iter(batches))
    again = fingerprints(training)

    # verdict
    differs = _differences(expected, found, rehearsal)
    if not differs and _to_the_bit(rehearsal):
        differs = [f"the {name}" for name in after if after[name] != again[name]]
    faults = [f"restored values of the {name} differ from the saved values" for name in wrong]
    faults += [f"{', '.join(differs[:3])} of the next update differ"] if differs else []
    return Check(
        name="checkpoint",
        passed=not faults,
        value=", ".join(faults) or f"{len(before)} groups of tensors restored, update repeated",
        expected=f"a restored run repeats the next update, {_promise(rehearsal)}",
        advice="A resumed run would give other weights than an uninterrupted run. Restore weights, "
        "optimizers, averages, discriminator and position in the data. `latentvae verify-resume` "
        "shows more.",
    )


def _save(rehearsal: Rehearsal) -> Path:
    training = rehearsal.training
    update = training.progress.update
    path = training.folder / f"{PREFIX}{update}"
    snapshot = take_snapshot(training)
    start = time.perf_counter()
    size = 0
    if is_main():
        path = save_checkpoint(training.folder, snapshot, update=update, keep=1)
        size = sum(file.stat().st_size for file in path.iterdir())
    barrier()
    rehearsal.save_seconds = time.perf_counter() - start
    rehearsal.checkpoint_bytes = from_main(size)
    return path


def _next_update(training: Training, source: Iterator[Batch]) -> dict[str, float]:
    """Make one more update and return what it logs."""
    for learner in training.task.learners.values():
        learner.module.zero_grad()  # another check reports left-over gradients
    result = Updates(training).make(source)
    return {
        f"{name} {i}": value.float().item()
        for i, values in enumerate(result.values)
        for name, value in values.items()
    }


def _differences(
    expected: dict[str, float], found: dict[str, float], rehearsal: Rehearsal
) -> list[str]:
    """Return the names of values that differ between two updates.

    On GPUs, and with more than two processes, only losses that differ by more than 1 %
    (`GPU_TOLERANCE`) count.
    """
    if _to_the_bit(rehearsal):
        names = [name for name in expected if found.get(name) != expected[name]]
    else:
        names = [
            name
            for name in expected
            if name.startswith("loss/")
            and not math.isclose(found[name], expected[name], rel_tol=GPU_TOLERANCE)
        ]
    return [name.split()[0] for name in names]


def _to_the_bit(rehearsal: Rehearsal) -> bool:
    """Return whether a restored run must repeat an update bit by bit.

    Sums over more than two processes, and sums on GPUs, have no fixed order.
    """
    return rehearsal.training.accelerator.device.type == "cpu" and world_size() <= 2


def _promise(rehearsal: Rehearsal) -> str:
    return "to the bit" if _to_the_bit(rehearsal) else f"its losses within {GPU_TOLERANCE:.0%}"

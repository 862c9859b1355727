"""Check that all processes have the same model and that each process has different images."""

from collections.abc import Iterator

from latentvae.distributed import gather_objects, world_size
from latentvae.proofs.checks import Check
from latentvae.proofs.preflight.rehearsal import Rehearsal, fingerprints


def checks(rehearsal: Rehearsal) -> Iterator[Check]:
    """Yield the checks that compare processes. With a single process, yield no check."""
    if world_size() > 1:
        yield equal(rehearsal)
        yield batches(rehearsal)


def equal(rehearsal: Rehearsal) -> Check:
    """Check that all processes have the same weights, optimizer states and averages.

    Processes differ if the model is not called through DDP, or if a codebook's usage counts are not
    summed over processes. Only the model of the first process is saved, so what the other processes
    learned differently would be lost.
    """
    ranks = gather_objects(fingerprints(rehearsal.training))
    differ = [name for name in ranks[0] if len({rank[name] for rank in ranks}) > 1]
    return Check(
        name="ranks-equal",
        passed=not differ,
        value=f"{', '.join(differ)} differ" if differ else "to the bit",
        expected=f"the same training state in all {len(ranks)} processes after "
        f"{len(rehearsal.seen)} updates",
        advice="Call the model and the discriminator that Accelerate prepared, never the modules "
        "inside them. Sum the counts of a codebook over ranks.",
    )


def batches(rehearsal: Rehearsal) -> Check:
    """Check that no batch is used twice, neither in one process nor in two processes.

    If the images are not divided among the processes, all processes read the same images, and only
    one process does useful work.
    """
    ranks = gather_objects([digest for digest, _, _ in rehearsal.batches])
    digests = [digest for rank in ranks for digest in rank]
    different = len(set(digests))
    return Check(
        name="ranks-batches",
        passed=different == len(digests),
        value=f"{different} different of {len(digests)}",
        expected="no batch is used twice, in one process or in two processes",
        advice="Give each process its own share of the images, by its rank.",
    )

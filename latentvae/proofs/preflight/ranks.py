"""Checks of the processes: one model in all, other images in each."""

from collections.abc import Iterator

from latentvae.distributed import gather_objects, world_size
from latentvae.proofs.checks import Check
from latentvae.proofs.preflight.rehearsal import Rehearsal, fingerprints


def checks(rehearsal: Rehearsal) -> Iterator[Check]:
    if world_size() > 1:
        yield equal(rehearsal)
        yield batches(rehearsal)


def equal(rehearsal: Rehearsal) -> Check:
    """A model called past DDP, or a codebook whose counts are not reduced, is another one in each
    process; the first one's is saved."""
    ranks = gather_objects(fingerprints(rehearsal.training))
    differ = [name for name in ranks[0] if len({rank[name] for rank in ranks}) > 1]
    return Check(
        name="ranks-equal",
        passed=not differ,
        value=f"{', '.join(differ)} differ" if differ else "to the bit",
        expected=f"the same in all {len(ranks)} processes after {len(rehearsal.seen)} updates",
        advice="call the prepared model and discriminator (never the modules inside), and reduce "
        "over ranks what a codebook learns from",
    )


def batches(rehearsal: Rehearsal) -> Check:
    """Without a share of its own, each process reads the same images, and the others are for
    nothing."""
    ranks = gather_objects([digest for digest, _, _ in rehearsal.batches])
    digests = [digest for rank in ranks for digest in rank]
    different = len(set(digests))
    return Check(
        name="ranks-batches",
        passed=different == len(digests),
        value=f"{different} different of {len(digests)}",
        expected="no batch twice, in whichever process",
        advice="give each process its own share of the images, by its rank",
    )

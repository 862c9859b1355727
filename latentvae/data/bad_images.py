"""Count the unreadable files of a training, and stop the training when there are too many."""

from collections.abc import Iterable

from latentvae.errors import UserError


class BadImages:
    """A record of a training's unreadable files. `check` raises an error if there are too many.

    Example:
        bad = BadImages()
        for name, reason in bad.update(batch.bad):
            print(f"skipped {name}: {reason}")
        bad.check(total=len(dataset), max_share=0.05)
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def update(self, bad: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Record (name, reason) pairs of unreadable files.

        Return the pairs whose name was not recorded before.
        """
        fresh: dict[str, str] = {}
        for name, reason in bad:
            if name not in self.reasons:
                fresh.setdefault(name, reason)
        self.reasons.update(fresh)
        return list(fresh.items())

    def check(self, total: int, max_share: float) -> None:
        """Raise an error if too many images are unreadable.

        A single unreadable image is always allowed.

        Args:
            total: number of images in the data set.
            max_share: largest fraction of unreadable images that is allowed, 0 to 1.

        Raises:
            UserError: more than one image is unreadable, and the fraction of unreadable images is
                above ``max_share``.
        """
        if len(self) <= max(max_share * total, 1):
            return
        first = ", ".join(f"'{name}' ({reason})" for name, reason in list(self.reasons.items())[:3])
        raise UserError(
            f"{len(self)} of {total} images ({len(self) / total:.1%}) cannot be read. At most "
            f"{max_share:.1%} of the images may be unreadable. The first are {first}. Repair or "
            "remove these files, or raise max_bad_share."
        )

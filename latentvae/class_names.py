"""Find a class of images by the name or the number that a user gives."""

from collections.abc import Sequence

from latentvae.errors import UserError, nearest


def class_number(label: str | int, names: Sequence[str]) -> int:
    """Return the number of a class, given by its name or its number.

    As in diffusers, one part of a name with commas is enough, such as "tench" for the class "tench,
    Tinca tinca". This works only if no other class has the same part.

    Args:
        label: name or number of the class.
        names: names of the classes 0, 1, 2 and so on. For classes without names, this argument is
            their numbers as text, see `number_names`.

    Raises:
        UserError: no class has this name or number.
    """
    if label in names:
        return names.index(str(label))
    split = [[part.strip() for part in name.split(",")] for name in names]
    parts = [number for number, found in enumerate(split) if label in found]
    if len(parts) == 1:
        return parts[0]
    if str(label).isdecimal() and int(label) < len(names):
        return int(label)

    numbered = list(names) == number_names(len(names))
    known = f"0 to {len(names) - 1}" if numbered else ", ".join(names)
    raise UserError(
        f"there is no class '{label}'. The classes are {known}{nearest(str(label), names)}"
    )


def number_names(count: int) -> list[str]:
    """Return the numbers 0 to `count` - 1 as text, which are the names of unnamed classes."""
    return [str(number) for number in range(count)]

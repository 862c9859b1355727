"""Decide for each codebook of a network whether it collapses, from the values of a validation."""

from collections.abc import Mapping

USED_SHARE = 0.1  # Share of used codes among the codes that could be used.
PERPLEXITY_SHARE = 0.05  # Perplexity / usable codes. Low if a few codes take nearly all tokens.
FALLEN_SHARE = 0.5  # Used codes, as a share of the largest number ever in use.


def code_states(
    values: Mapping[str, float], *, num_codes: int, most_used: dict[str, int]
) -> list[tuple[bool, str]]:
    """Return for each codebook whether it collapses, and the warning to print if it does.

    A codebook collapses if its tokens use few of the codes that they could use (at most one code
    for each token), if their perplexity is low, or if they use many fewer codes than before.

    Args:
        values: dict from log names to the values of one validation.
        num_codes: number of codes of each codebook.
        most_used: largest number of used codes so far, by codebook. The function updates this dict.
    """
    states = []
    for level in _levels(values):
        used = round(values[f"validation/usage{level}"] * num_codes)
        perplexity = values[f"validation/perplexity{level}"]
        tokens = values[f"validation/tokens{level}"]

        # few codes, or many fewer than before
        most, usable = most_used.get(level, 0), min(num_codes, tokens)
        few = used < max(USED_SHARE * usable, 2) or perplexity < PERPLEXITY_SHARE * usable
        fallen = used < FALLEN_SHARE * most
        most_used[level] = max(most, used)

        once = f" ({most:,} at most before)" if fallen else ""
        which = level.replace("_level", " of level ")
        sentence = (
            f"the codebook{which} collapses: {used:,} of {num_codes:,} codes are used{once} by "
            f"{tokens:,.0f} tokens, perplexity {perplexity:.1f}"
        )
        states.append((few or fallen, sentence))
    return states


def _levels(values: Mapping[str, float]) -> list[str]:
    """Return the suffix of each codebook's log names: "" for one codebook, else "_level0", ..."""
    start = "validation/usage"
    levels = [name.removeprefix(start) for name in values if name.startswith(f"{start}_level")]
    return levels or [""]

"""Draw the tokens of images from a `TokenTransformer`, with cached keys and values.

The random numbers of image number i depend only on the seed and on i. So an image does not depend
on its batch or its rank, except for rounding.

`B` batch, `T` tokens of an image, `K` codes, `S` slots of a text.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentvae.errors import UserError
from latentvae.priors.transformer import NO_CLASS, Cache, Text, TokenTransformer, with_text


@dataclass(frozen=True)
class Sampling:
    """Options for drawing tokens: guidance, temperature and a limit to the most likely codes.

    Args:
        guidance: weight g of classifier-free guidance (arXiv:2207.12598). Let a be the logits
            without the condition and b the logits with the condition. The guided logits are
            a + g (b - a). g = 1 is no guidance, and g = 0 ignores the condition.
        temperature: number above 0 by which logits are divided. With a lower temperature, likely
            tokens are drawn more often.
        top_k: draw only from the `top_k` most likely codes. `top_k` 0 draws from all codes.
        top_p: draw only from the most likely codes, as few as are needed for a total probability of
            at least `top_p` (nucleus sampling, arXiv:1904.09751). `top_p` 1 draws from all codes.

    Raises:
        UserError: a value is out of range.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature must be above 0 (got {self.temperature:g}).")
        if not self.guidance >= 0:
            raise UserError(f"guidance must be at least 0 (got {self.guidance:g}).")
        if self.top_k < 0:
            raise UserError(f"top_k must be at least 0 (got {self.top_k}). 0 takes all codes.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1 (got {self.top_p:g}).")


@torch.no_grad()
def sample_tokens(
    net: TokenTransformer,
    classes: Tensor,
    *,
    text: Text | None = None,
    options: Sampling | None = None,
    seed: int = 0,
    numbers: Iterable[int] | None = None,
) -> Tensor:
    """Draw the tokens of images, (B, T), int64 on the network's device.

    Args:
        net: the transformer, in eval mode.
        classes: class of each image, (B,). `NO_CLASS` means "no class".
        text: states of a text for each image.
        options: how tokens are drawn.
        seed: seed of the random numbers.
        numbers: a number for each image, by default 0 to B - 1. The random numbers of an image
            depend only on the seed and on its number.
    """
    options = options or Sampling()
    uniform = _uniform(seed, range(len(classes)) if numbers is None else numbers, net.num_tokens)
    guided = options.guidance != 1
    classes = classes.to(net.device)
    if guided:
        classes, text = with_unconditional(classes, text)

    steps, drawn = Steps(net, classes, text), list[Tensor]()
    for place in range(net.num_tokens):
        before = drawn[-1] if drawn else None
        logits = steps.logits(before.repeat(2) if guided and before is not None else before)
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + options.guidance * (conditional - unconditional)
        drawn.append(draw(logits, uniform[:, place], options).to(net.device))
    return torch.stack(drawn, dim=1)


def with_unconditional(classes: Tensor, text: Text | None) -> tuple[Tensor, Text | None]:
    """Double the batch: all images with their condition, then all images without a condition."""
    classes = torch.cat([classes, torch.full_like(classes, NO_CLASS)])
    if text is not None:
        mask = torch.cat([text.mask, torch.zeros_like(text.mask)])
        text = Text(text.states.repeat(2, 1, 1), mask)
    return classes, text


class Steps:
    """Compute the logits of one token after the other, with cached keys and values.

    Args:
        net: the transformer, in eval mode.
        classes: class of each image, (B,). `NO_CLASS` means "no class".
        text: states of a text for each image.
    """

    def __init__(self, net: TokenTransformer, classes: Tensor, text: Text | None = None) -> None:
        self.net, self.classes, self.text = net, classes, text
        slots = net.num_tokens + (0 if text is None else text.states.shape[1])
        self._caches = [Cache(slots) for _ in net.blocks]
        self._place = 0

    def logits(self, before: Tensor | None) -> Tensor:
        """Return the logits (B, K) of the next token.

        Args:
            before: the previous token of each image, (B,), or None for the first token.
        """
        net, place = self.net, self._place
        hidden, mask, turns = self._start() if before is None else self._next(before)
        for block, cache in zip(net.blocks, self._caches, strict=True):
            hidden = block(hidden, turns, mask, cache)
        self._place += 1
        return net.outputs[net.level_of(place)](net.norm(hidden[:, -1])).float()

    def _start(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the inputs (text, then class), their mask and rotations for the first token."""
        net = self.net
        hidden = net.embed_condition(len(self.classes), self.classes) + net.places.weight[:1]
        if self.text is None:
            return hidden, None, net.turns[:, :1]
        words, mask = net.embed_text(self.text, after=1)
        turns = with_text(net.turns[:, :1], words.shape[1])
        return torch.cat([words, hidden], dim=1), mask, turns

    def _next(self, before: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the inputs, their mask and rotations for the token that comes after `before`."""
        net, place = self.net, self._place
        hidden = net.tokens(before + net.offsets[place - 1]) + net.places.weight[place]
        mask = None
        if self.text is not None:
            seen = torch.ones(len(before), place + 1, dtype=torch.bool, device=before.device)
            mask = torch.cat([self.text.mask, seen], dim=1)[:, None, None]
        return hidden[:, None], mask, net.turns[:, place : place + 1]


def draw(logits: Tensor, uniform: Tensor, options: Sampling) -> Tensor:
    """Draw one code for each row of logits (B, K), by the inverse cumulative distribution.

    Args:
        logits: (B, K), on any device.
        uniform: random numbers in [0, 1), (B,), float64 on the CPU.

    Returns:
        The codes, (B,), int64 on the CPU. A code with probability 0 is never drawn.
    """
    logits = logits.cpu().double() / options.temperature  # Apple GPUs have no float64
    if options.top_k and options.top_k < logits.shape[1]:
        smallest = logits.topk(options.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(dim=1)

    if options.top_p < 1:
        # A code is kept if the probabilities of all more likely codes add up to less than top_p.
        ordered, order = probabilities.sort(dim=1, descending=True)
        before = ordered.cumsum(dim=1) - ordered
        ordered = ordered.masked_fill(before >= options.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)

    cumulative = probabilities.cumsum(dim=1)
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return chosen[:, 0].clamp(max=logits.shape[1] - 1)


def _uniform(seed: int, numbers: Iterable[int], tokens: int) -> Tensor:
    """Return random numbers in [0, 1) for each image and token, (B, T), float64."""
    rows = [np.random.default_rng([seed, number]).random(tokens) for number in numbers]
    return torch.from_numpy(np.stack(rows))

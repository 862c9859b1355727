"""The collapse watch: reads the rows and validations that a run logs, and tells in words when the
posterior, the codebook or the discriminator has gone wrong, or validation LPIPS diverges.

    row or validation -> is the condition there? -> for long enough -> finding (told once)

It knows no run and no rank: its input is reduced over ranks already, so every rank finds the same.
A condition begins, and ends, when it was so in `PATIENCE` observations in a row, over at least
`LASTING` updates: neither a single odd row nor a small `log_steps` makes a finding, and what
wavers around a bound is not told again and again.

`K` codes, `d` latent channels.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pydantic import ConfigDict

from latentvae.bottlenecks.bottleneck_config import BottleneckConfig
from latentvae.losses.adversarial import GAN_LOSSES
from latentvae.losses.posterior import SILENT_KL
from latentvae.tasks.autoencoder.config import TrainConfig

POSTERIOR, CODEBOOK = "posterior_collapse", "codebook_collapse"
DISCRIMINATOR, LPIPS = "discriminator_won", "lpips_diverges"
PATIENCE = {POSTERIOR: 3, CODEBOOK: 2, DISCRIMINATOR: 3, LPIPS: 3}  # rows, or validations
LASTING = 50  # updates from the first to the last of them, at least
BEGINNING = 100  # updates without a watch: what has learned nothing looks collapsed

ACTIVE_SHARE = 0.5  # of the channels; fewer active ones (arXiv:1509.00519) are a collapse
USED_SHARE = 0.1  # of the codes that could be used
PERPLEXITY_SHARE = 0.05  # the same for the perplexity: many codes, nearly all tokens of a few
FALLEN_SHARE = 0.5  # of the most codes ever in use
WON_SHARE = (
    0.05  # of the discriminator's loss where it tells nothing (hinge 1, non-saturating 2 log 2)
)
WORSE = 1.1  # times the best validation LPIPS


@dataclass(frozen=True)
class Watched:
    """What there is to watch.

    Attributes:
        posterior_from: updates before which a collapsed posterior is no news; None: there is none,
            its encoder is frozen, or it is asked for.
        posterior_remedy: options against it.
        num_channels: d (1 of Gumbel-softmax).
        codes_from: the same for codes; None: there are none.
        num_codes: K.
        codes_remedy: options of this quantiser.
        validated_on: which images, so that others are not compared with them.
        discriminator_loss: loss of a discriminator that cannot tell images from reconstructions.
        discriminator_from: update at which the adversarial weight is full. The watch starts
            there, because the model hardly answers the discriminator before. None: no watch.
        obeyed_from: update at which the adversarial weight leaves 0. None: no watch.
    """

    posterior_from: int | None = None
    posterior_remedy: str = ""
    num_channels: int = 1
    codes_from: int | None = None
    num_codes: int = 1
    codes_remedy: str = ""
    validated_on: str = ""
    discriminator_loss: float = 1.0
    discriminator_from: int | None = None
    obeyed_from: int | None = None


@dataclass(frozen=True)
class Finding:
    """A condition that has begun.

    Attributes:
        name: of the condition.
        sentence: with its numbers and what to try.
    """

    name: str
    sentence: str


@dataclass
class Condition:
    """What is remembered of a condition; checked as strictly when it is read from a checkpoint.

    Attributes:
        holds: whether it is there.
        against: observations in a row that say otherwise; the first at update `since`.
        times: how often it began: `first` and `last` the updates.
        ended: the update at which it last did.
        sentence: what was last told.
        of_discriminator: whether the discriminator was to blame then.
    """

    holds: bool = False
    against: int = 0
    since: int = 0
    times: int = 0
    first: int = 0
    last: int = 0
    ended: int = 0
    sentence: str = ""
    of_discriminator: bool = False

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    def turns(self, there: bool, *, update: int, patience: int) -> bool:
        """Take in an observation; whether the condition begins or ends by it."""
        if there == self.holds:
            self.against = 0
            return False
        if not self.against:
            self.since = update
        self.against += 1
        if self.against < patience or update - self.since < LASTING:
            return False
        self.holds, self.against = there, 0
        if there:
            self.times += 1
            self.first = self.first or update
            self.last = update
        else:
            self.ended = update
        return True


class CollapseWatch:
    """Observes a run.

    Args:
        watched: what there is to watch.
        saved: `state_dict()` of an earlier part of the run.
    """

    def __init__(self, watched: Watched, *, saved: Mapping[str, Any] | None = None) -> None:
        saved = saved or {}
        self.watched = watched
        conditions = saved.get("conditions", {})
        self._conditions = {name: Condition(**conditions.get(name, {})) for name in PATIENCE}
        self._best_lpips: float | None = saved.get("best_lpips")
        self._best_update: int = saved.get("best_update", 0)
        self._most_used: int = saved.get("most_used", 0)
        if saved and saved.get("validated_on") != watched.validated_on:  # not to be compared
            self._best_lpips, self._best_update, self._most_used = None, 0, 0
        if watched.discriminator_from is None:
            self._conditions[DISCRIMINATOR].holds = False

    def row(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        """What begins with a row of training values, after ``update`` updates."""
        return [*self._posterior(update, values), *self._discriminator(update, values)]

    def validation(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        """What begins with a validation."""
        return [*self._codes(update, values), *self._lpips(update, values)]

    def flags(self) -> dict[str, float]:
        """For the log: 1 by name for each condition that is there."""
        return {f"watch/{name}": 1.0 for name, now in self._conditions.items() if now.holds}

    def summary(self) -> str | None:
        """What was seen in the whole run; None if nothing was."""
        told = [
            f"  {name.replace('_', ' ')}, {_when(seen)}: {seen.sentence}"
            for name, seen in self._conditions.items()
            if seen.times
        ]
        return "\n".join(["what the collapse watch saw in this run:", *told]) if told else None

    def blames_discriminator(self) -> bool:
        """Whether something is wrong that switching the discriminator off may help against."""
        return any(now.holds and now.of_discriminator for now in self._conditions.values())

    def discriminator_stops(self, update: int) -> None:
        """The discriminator is switched off: it has not won any longer."""
        self.watched = replace(self.watched, discriminator_from=None, obeyed_from=None)
        discriminator = self._conditions[DISCRIMINATOR]
        if discriminator.holds:
            discriminator.holds, discriminator.against, discriminator.ended = False, 0, update

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "conditions": {name: asdict(now) for name, now in self._conditions.items()},
            "best_lpips": self._best_lpips,
            "best_update": self._best_update,
            "most_used": self._most_used,
            "validated_on": self.watched.validated_on,
        }

    def _posterior(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        """Active units (Burda et al. 2016) and channels whose KL is nothing (Lucas et al. 2019,
        arXiv:1911.02469): too few of the former or too many of the latter."""
        start, d = self.watched.posterior_from, self.watched.num_channels
        if start is None or update <= start or "latent/silent_channels" not in values:
            return []
        silent, active = values["latent/silent_channels"], values.get("latent/active_units")
        vary = "" if active is None else f", {active:.0f} vary with the image"  # Gumbel has no mean
        return self._observe(
            POSTERIOR,
            update,
            (active is not None and active < ACTIVE_SHARE * d) or silent > (1.0 - ACTIVE_SHARE) * d,
            f"the posterior collapses: of {d} latent channels {silent:.3g} have a KL of nearly "
            f"nothing{vary}, so the decoder is told little",
            f"Try {self.watched.posterior_remedy}",
        )

    def _discriminator(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        """A loss near 0 alone says it: the mean logits are then apart by twice the margin less
        twice the loss (hinge), and as far without a margin (Jensen's inequality)."""
        start = self.watched.discriminator_from
        if start is None or update <= start or "discriminator/loss" not in values:
            return []
        loss, blind = values["discriminator/loss"], self.watched.discriminator_loss
        return self._observe(
            DISCRIMINATOR,
            update,
            loss < WON_SHARE * blind,
            f"the discriminator has won: its loss is {loss:.2g} (a blind one has {blind:.2g}), its "
            f"logits are {values['discriminator/logits_real']:.2g} for images and "
            f"{values['discriminator/logits_fake']:.2g} for what the model makes of them",
            "Try a lower --disc_learning_rate, --disc_augment, --disc_r1_weight or "
            "--disc_lecam_weight; --disc_watch disable goes on without it",
            of_discriminator=True,
        )

    def _codes(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        start, K = self.watched.codes_from, self.watched.num_codes
        if start is None or update <= start or "validation/usage" not in values:
            return []
        used, perplexity = round(values["validation/usage"] * K), values["validation/perplexity"]
        usable = min(K, values["validation/tokens"])
        few = used < max(USED_SHARE * usable, 2) or perplexity < PERPLEXITY_SHARE * usable
        fallen = used < FALLEN_SHARE * self._most_used
        once = f" ({self._most_used:,} were once)" if fallen else ""
        self._most_used = max(self._most_used, used)
        return self._observe(
            CODEBOOK,
            update,
            few or fallen,
            f"the codebook collapses: {used:,} of {K:,} codes are used{once} by "
            f"{values['validation/tokens']:,.0f} tokens, perplexity {perplexity:.1f}",
            f"Try {self.watched.codes_remedy}",
        )

    def _lpips(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        """A NaN is worse than any number."""
        lpips, best = values["validation/lpips"], self._best_lpips
        if not math.isnan(lpips) and (best is None or lpips < best):
            self._best_lpips, self._best_update, best = lpips, update, lpips
        if best is None:
            best = math.inf
        now, obeyed_from = self._conditions[LPIPS], self.watched.obeyed_from
        since = now.since if now.against else update
        of_discriminator = obeyed_from is not None and since > obeyed_from
        discriminator = ", --disc_scale or --disc_weight_cap, or go on with --disc_watch disable"
        return self._observe(
            LPIPS,
            update,
            math.isnan(lpips) or lpips > WORSE * best,
            f"validation LPIPS diverges: {lpips:.3f}, where it was {best:.3f} at update "
            f"{self._best_update:,}",
            f"Try a lower --learning_rate{discriminator if of_discriminator else ''}",
            of_discriminator=of_discriminator,
        )

    def _observe(
        self,
        name: str,
        update: int,
        there: bool,
        what: str,
        remedy: str,
        *,
        of_discriminator: bool = False,
    ) -> list[Finding]:
        now = self._conditions[name]
        if not now.turns(there, update=update, patience=PATIENCE[name]) or not there:
            return []
        now.sentence = f"{what} (since update {now.since:,}). {remedy}"
        now.of_discriminator = of_discriminator
        return [Finding(name, now.sentence)]


def _validated_on(config: TrainConfig) -> str:
    """Which images, and how use of the codes is counted; older runs did both otherwise."""
    counted = ", levels apart" if config.model.bottleneck.num_codebooks > 1 else ""
    data = config.data
    return f"{data.max_validation_images} all over {data.validation_data_dir}{counted}"


def _when(seen: Condition) -> str:
    times = f", then {seen.times - 1} times more, last" if seen.times > 1 else ""
    again = f"{times} from update {seen.last:,}" if times else ""
    return f"from update {seen.first:,}{again} {'on' if seen.holds else f'to {seen.ended:,}'}"


def what_to_watch(
    config: TrainConfig,
    *,
    discriminator_start: int,
    num_codes: int | None,
    discriminator_stopped: bool = False,
) -> Watched:
    """Decide from the options of a run what to watch.

    Args:
        discriminator_start: update in which the discriminator starts.
    """
    model, discriminator = config.model, config.discriminator
    beginning = max(BEGINNING, config.optimizer.lr_warmup_steps)
    # A pixel loss is held by silencing channels, and few bits are hardly any.
    objective = config.objective
    asked_for = objective.rec_target > 0 or 0 < objective.kl_target * math.log(2) < SILENT_KL
    has_posterior = model.has_kl and not model.freeze_encoder and not asked_for
    has_discriminator = (
        discriminator.disc_scale > 0
        and discriminator.disc_watch != "off"
        and not discriminator_stopped
    )
    obeyed_from = discriminator_start + discriminator.disc_warmup_steps
    nothing = torch.zeros(1)
    return Watched(
        # A capacity that grows from 0 asks for a posterior that says nothing at first.
        posterior_from=(
            max(beginning, config.objective.kl_capacity_steps) if has_posterior else None
        ),
        posterior_remedy=_posterior_remedy(config),
        num_channels=model.kl_channels,
        codes_from=None if num_codes is None else beginning,
        num_codes=num_codes or 1,
        codes_remedy=_codes_remedy(model.bottleneck) if model.has_codes else "",
        validated_on=_validated_on(config),
        discriminator_loss=float(
            GAN_LOSSES[discriminator.disc_loss].discriminator(nothing, nothing)
        ),
        discriminator_from=obeyed_from + discriminator.disc_ramp_steps
        if has_discriminator
        else None,
        obeyed_from=obeyed_from if has_discriminator else None,
    )


def _posterior_remedy(config: TrainConfig) -> str:
    for name in ("kl_target", "kl_capacity", "free_bits"):
        if value := getattr(config.objective, name):
            return f"a higher --{name} than {value:g}"
    return "a smaller --kl_scale, --kl_warmup_steps or --free_bits"


def _codes_remedy(options: BottleneckConfig) -> str:
    """Options of the bottleneck that keep codes in use and are not in use themselves."""
    return ", ".join([*options.remedies(), "a lower --learning_rate"])

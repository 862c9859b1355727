"""Watch the values that a run logs, and warn when the training goes wrong.

The watch warns of four conditions: the posterior collapses, the codebook collapses, the
discriminator wins (its loss is near 0), or validation LPIPS diverges.

    logged values -> is the condition present? -> for long enough? -> warning (printed once)

The logged values are already averaged over ranks, so every rank gives the same warnings. An
observation is a row of the log, or a validation. A condition begins or ends only after `PATIENCE`
consecutive observations over at least `LASTING` updates. So neither a single unusual row nor a
small `log_steps` (the number of updates between two rows) causes a warning. A value that moves
around the limit of its condition does not cause many warnings.

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
from latentvae.tasks.autoencoder.code_levels import code_states
from latentvae.tasks.autoencoder.config import TrainConfig

POSTERIOR, CODEBOOK = "posterior_collapse", "codebook_collapse"
DISCRIMINATOR, LPIPS = "discriminator_won", "lpips_diverges"
PATIENCE = {POSTERIOR: 3, CODEBOOK: 2, DISCRIMINATOR: 3, LPIPS: 3}  # number of observations
LASTING = 50  # smallest number of updates from the first to the last observation
BEGINNING = 100  # updates before the watch starts, because an untrained model looks collapsed

ACTIVE_SHARE = 0.5  # Share of active channels (arXiv:1509.00519).
# Discriminator's loss, as a share of the loss at logits of 0 (hinge 1, logistic 2 log 2).
WON_SHARE = 0.05
WORSE = 1.1  # Validation LPIPS, as a multiple of the best.


@dataclass(frozen=True)
class Watched:
    """Says which conditions (signs of a failing training) to watch in a run, and from which update.

    Attributes:
        posterior_from: update after which a collapsed posterior is reported. None means that the
            posterior is not watched: there is no posterior, the encoder is frozen, or the options
            themselves make channels inactive.
        posterior_remedy: text that names options that help against a collapsed posterior.
        num_channels: number of latent channels d, or 1 with Gumbel-softmax.
        codes_from: update after which a collapsed codebook is reported. None means that there are
            no codes.
        num_codes: number of codes K.
        codes_remedy: text that names options of this quantizer that help against a collapse.
        validated_on: name of the validation images. On resume, the saved best results are dropped
            if they were measured on other images.
        discriminator_loss: loss of a discriminator that cannot tell images from reconstructions.
            The watch compares the discriminator's loss with this number.
        discriminator_from: update at which the adversarial weight reaches its full value. The watch
            of the discriminator starts at this update, because with a small adversarial weight the
            model hardly reacts to the discriminator. None means that the discriminator is not
            watched.
        effective_from: update after which the adversarial weight is above 0. None means that the
            discriminator is not watched.
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
    effective_from: int | None = None


@dataclass(frozen=True)
class Finding:
    """A warning that a condition has begun, such as the collapse of the posterior.

    Attributes:
        name: name of the condition.
        sentence: message with the measured numbers and with options to try.
    """

    name: str
    sentence: str


@dataclass
class Condition:
    """The history of a watched condition, such as the collapse of the posterior.

    The history is saved in checkpoints. On resume, the types of the saved values are checked.

    Attributes:
        holds: whether the condition is present.
        against: number of consecutive latest observations that contradict `holds`.
        since: the update of the first observation that contradicts `holds`.
        times: how often the condition began.
        first: update at which the condition first began.
        last: update at which the condition last began.
        ended: update at which the condition last ended.
        sentence: message of the last warning, or "" before the first warning.
        of_discriminator: whether the discriminator may be the cause of the condition.
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
        """Record whether the condition is present now (`there`).

        Return whether the condition begins or ends at this update.
        """
        if there == self.holds:
            self.against = 0
            return False

        # long enough?
        if not self.against:
            self.since = update
        self.against += 1
        if self.against < patience or update - self.since < LASTING:
            return False

        # the condition begins or ends
        self.holds, self.against = there, 0
        if there:
            self.times += 1
            self.first = self.first or update
            self.last = update
        else:
            self.ended = update
        return True


class CollapseWatch:
    """Watches one run for conditions such as a collapsed posterior, and reports when one begins.

    Args:
        watched: the conditions to watch.
        saved: `state_dict()` from a checkpoint of the run, if the run is resumed.
    """

    def __init__(self, watched: Watched, *, saved: Mapping[str, Any] | None = None) -> None:
        saved = saved or {}
        self.watched = watched
        conditions = saved.get("conditions", {})
        self._conditions = {name: Condition(**conditions.get(name, {})) for name in PATIENCE}
        self._best_lpips: float | None = saved.get("best_lpips")
        self._best_update: int = saved.get("best_update", 0)
        self._most_used: dict[str, int] = dict(saved.get("most_used", {}))
        # Values of other validation images cannot be compared.
        if saved and saved.get("validated_on") != watched.validated_on:
            self._best_lpips, self._best_update, self._most_used = None, 0, {}
        if watched.discriminator_from is None:
            self._conditions[DISCRIMINATOR].holds = False

    def row(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        """Return new warnings from one row of logged training values, after `update` updates."""
        return [*self._posterior(update, values), *self._discriminator(update, values)]

    def validation(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        """Return new warnings from the values of a validation, after `update` updates."""
        return [*self._codes(update, values), *self._lpips(update, values)]

    def flags(self) -> dict[str, float]:
        """Return a dict from a log name to 1 for each condition that is present now."""
        return {f"watch/{name}": 1.0 for name, now in self._conditions.items() if now.holds}

    def summary(self) -> str | None:
        """Return the run's last warning of each condition as text, or None if there were none."""
        shown = [
            f"  {name.replace('_', ' ')}, {_when(seen)}: {seen.sentence}"
            for name, seen in self._conditions.items()
            if seen.times
        ]
        return "\n".join(["findings of the collapse watch in this run:", *shown]) if shown else None

    def blames_discriminator(self) -> bool:
        """Return whether a problem is present that may end if the discriminator is switched off."""
        return any(now.holds and now.of_discriminator for now in self._conditions.values())

    def discriminator_stops(self, update: int) -> None:
        """Record that the discriminator is off, and end the condition `discriminator_won`."""
        self.watched = replace(self.watched, discriminator_from=None, effective_from=None)
        discriminator = self._conditions[DISCRIMINATOR]
        if discriminator.holds:
            discriminator.holds, discriminator.against, discriminator.ended = False, 0, update

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the watch as plain values for JSON."""
        return {
            "conditions": {name: asdict(now) for name, now in self._conditions.items()},
            "best_lpips": self._best_lpips,
            "best_update": self._best_update,
            "most_used": dict(self._most_used),
            "validated_on": self.watched.validated_on,
        }

    def _posterior(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        """Check for a collapsed posterior: few active units, or many channels without KL.

        arXiv:1509.00519 defines active units, and arXiv:1911.02469 defines channels without KL.
        """
        start, d = self.watched.posterior_from, self.watched.num_channels
        # Gumbel-softmax has no mean, so it has no active units. A flow mixes channels, so no
        # channel has its own KL.
        silent, active = values.get("latent/silent_channels"), values.get("latent/active_units")
        if start is None or update <= start or (silent is None and active is None):
            return []
        none = "" if silent is None else f"{silent:.3g} of {d} latent channels have nearly no KL"
        vary = "" if active is None else f"{active:.0f} of {d} latent channels vary with the image"
        return self._observe(
            POSTERIOR,
            update,
            (active is not None and active < ACTIVE_SHARE * d)
            or (silent is not None and silent > (1.0 - ACTIVE_SHARE) * d),
            f"the posterior collapses: {', and '.join(filter(None, (none, vary)))}, so the decoder "
            "gets little information",
            f"Try {self.watched.posterior_remedy}",
        )

    def _discriminator(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        """Check whether the discriminator has won: its loss is near 0.

        A small loss alone proves that the discriminator has won. With the hinge loss, the mean
        logits of images and reconstructions differ by at least twice the margin minus twice the
        loss. For a loss without a margin, Jensen's inequality gives a similar bound.
        """
        start = self.watched.discriminator_from
        if start is None or update <= start or "discriminator/loss" not in values:
            return []
        loss, blind = values["discriminator/loss"], self.watched.discriminator_loss
        return self._observe(
            DISCRIMINATOR,
            update,
            loss < WON_SHARE * blind,
            f"the discriminator has won: its loss is {loss:.2g} ({blind:.2g} for pure guessing), "
            f"its logits are {values['discriminator/logits_real']:.2g} for images and "
            f"{values['discriminator/logits_fake']:.2g} for reconstructions",
            "Try a lower --disc_learning_rate, --disc_augment, --disc_r1_weight or "
            "--disc_lecam_weight. Or switch the discriminator off with --disc_watch disable.",
            of_discriminator=True,
        )

    def _codes(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        """Check for a collapsed codebook: few codes in use, or many fewer than before.

        With several codebooks, the condition is present if at least one codebook collapses.
        """
        start, K = self.watched.codes_from, self.watched.num_codes
        if start is None or update <= start or "validation/usage" not in values:
            return []

        states = code_states(values, num_codes=K, most_used=self._most_used)
        there, sentence = next((state for state in states if state[0]), states[0])
        return self._observe(CODEBOOK, update, there, sentence, f"Try {self.watched.codes_remedy}")

    def _lpips(self, update: int, values: Mapping[str, float]) -> list[Finding]:
        """Check whether validation LPIPS is much worse than its best value so far.

        NaN counts as worse.
        """
        # the best so far
        lpips, best = values["validation/lpips"], self._best_lpips
        if not math.isnan(lpips) and (best is None or lpips < best):
            self._best_lpips, self._best_update, best = lpips, update, lpips
        if best is None:
            best = math.inf

        # the discriminator may be the cause if it had an effect when LPIPS became worse
        now, effective_from = self._conditions[LPIPS], self.watched.effective_from
        since = now.since if now.against else update
        of_discriminator = effective_from is not None and since > effective_from
        discriminator = ", --disc_scale or --disc_weight_cap, or --disc_watch disable"

        return self._observe(
            LPIPS,
            update,
            math.isnan(lpips) or lpips > WORSE * best,
            f"validation LPIPS diverges: it is {lpips:.3f}, and was {best:.3f} at update "
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
    """Return a name for the validation images and for the way in which used codes are counted."""
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
    """Return the conditions to watch in a run with these options.

    Args:
        config: the run's options.
        discriminator_start: first update in which the discriminator learns.
        num_codes: number of codes of each codebook, or None for a network without codes.
        discriminator_stopped: whether the watch has switched the discriminator off.
    """
    # posterior
    model, discriminator = config.model, config.discriminator
    beginning = max(BEGINNING, config.optimizer.lr_warmup_steps)
    # A target for the pixel loss makes channels inactive. So does a very small target for the KL.
    objective = config.objective
    asked_for = objective.rec_target > 0 or 0 < objective.kl_target * math.log(2) < SILENT_KL
    has_posterior = model.has_kl and not model.freeze_encoder and not asked_for

    # discriminator
    has_discriminator = (
        discriminator.disc_scale > 0
        and discriminator.disc_watch != "off"
        and not discriminator_stopped
    )
    effective_from = discriminator_start + discriminator.disc_warmup_steps
    zero = torch.zeros(1)
    blind_loss = GAN_LOSSES[discriminator.disc_loss].discriminator(zero, zero)

    return Watched(
        # While the KL's capacity grows from 0, a collapsed posterior is intended.
        posterior_from=(
            max(beginning, config.objective.kl_capacity_steps) if has_posterior else None
        ),
        posterior_remedy=_posterior_remedy(config),
        num_channels=model.kl_channels,
        # codes
        codes_from=None if num_codes is None else beginning,
        num_codes=num_codes or 1,
        codes_remedy=_codes_remedy(model.bottleneck) if model.has_codes else "",
        validated_on=_validated_on(config),
        discriminator_loss=float(blind_loss),
        discriminator_from=(
            effective_from + discriminator.disc_ramp_steps if has_discriminator else None
        ),
        effective_from=effective_from if has_discriminator else None,
    )


def _posterior_remedy(config: TrainConfig) -> str:
    for name in ("kl_target", "kl_capacity", "free_bits"):
        if value := getattr(config.objective, name):
            return f"a higher --{name} than {value:g}"
    if getattr(config.model, "posterior_flow", 0):  # a flow has no free bits
        return "a smaller --kl_scale, --kl_warmup_steps or --kl_target"
    return "a smaller --kl_scale, --kl_warmup_steps or --free_bits"


def _codes_remedy(options: BottleneckConfig) -> str:
    """Return options that help to keep codes in use and are not set yet."""
    return ", ".join([*options.remedies(), "a lower --learning_rate"])

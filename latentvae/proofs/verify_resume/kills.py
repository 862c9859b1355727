"""When a run is killed: at random moments of its updates and of its saves, all from one seed."""

import random
import time
from dataclasses import dataclass

from latentvae.proofs.verify_resume.launch import Launch, Pace

AFTER_LAST = "what follows the last update"
TRAINING_SHARE = 0.5  # of the time after the last update; the launcher takes the rest to end


@dataclass(frozen=True, order=True)
class Kill:
    """A moment of a run.

    Attributes:
        update: the update (from 1) in which it falls or whose save it hits; one more than there
            are: what comes after the last.
        save: it hits the save after that update.
        share: how far into the update or the save, from 0 to 1.
    """

    update: int
    save: bool
    share: float


def draw_kills(count: int, *, updates: int, save_every: int, seed: int) -> list[Kill]:
    """Kills spread over a run in its order, every second one in a save."""
    draw = random.Random(seed)
    kills = []
    for i in range(count):
        save = i % 2 == 1
        update = save_every * draw.randint(1, updates // save_every) if save else 0
        kills.append(Kill(update or draw.randint(1, updates + 1), save, draw.random()))
    return sorted(kills)


def carry_out(kill: Kill, launch: Launch, *, resumed_at: int, updates: int, pace: Pace) -> str:
    """Wait for the moment and kill; returns what was hit, or nothing if the training had ended.

    A moment that lies before the checkpoint it goes on from becomes the next update, or the next
    save.
    """
    update = max(kill.update, resumed_at + 1)

    def come() -> bool:
        done = launch.updates() or 0
        if kill.save and resumed_at < updates:
            return done >= update and launch.saving()
        return done >= update - 1

    tail = TRAINING_SHARE * pace.tail
    seconds = pace.save if kill.save else pace.update if update <= updates else tail
    if not launch.wait_for(lambda: launch.updates() is not None):
        return ""
    family = launch.family()  # looking takes longer than the save of a small network
    if not launch.wait_for(come):
        return ""
    time.sleep(kill.share * seconds)
    launch.kill(family)
    if launch.process.returncode >= 0:  # it had ended by itself
        return ""
    done = launch.updates() or 0
    if launch.saving():
        return f"the save of update {done}"
    return f"update {done + 1}" if done < updates else AFTER_LAST

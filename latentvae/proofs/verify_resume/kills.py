"""Choose when a run is killed: at moments of its updates and saves, drawn at random from a seed."""

import random
import time
from dataclasses import dataclass

from latentvae.proofs.verify_resume.launch import Launch, Pace

AFTER_LAST = "the work after the last update"
# Share of the time after the last update during which the training still computes. In the rest of
# this time, only the launcher is still running.
TRAINING_SHARE = 0.5


@dataclass(frozen=True, order=True)
class Kill:
    """A moment at which a run is killed.

    Attributes:
        update: number (from 1) of the update to interrupt, or of the update whose save is
            interrupted. The run's number of updates plus 1 means the work after the last update.
        save: whether to kill while the checkpoint after the update is saved.
        share: share of the time of the update or the save that passes before the kill, from 0 to 1.
    """

    update: int
    save: bool
    share: float


def draw_kills(count: int, *, updates: int, save_every: int, seed: int) -> list[Kill]:
    """Return kills at random moments of a run, in order of time.

    Half of the kills (rounded down) are during the save of a checkpoint.
    """
    draw = random.Random(seed)
    kills = []
    for i in range(count):
        save = i % 2 == 1
        update = save_every * draw.randint(1, updates // save_every) if save else 0
        kills.append(Kill(update or draw.randint(1, updates + 1), save, draw.random()))
    return sorted(kills)


def carry_out(kill: Kill, launch: Launch, *, resumed_at: int, updates: int, pace: Pace) -> str:
    """Kill a launch at the planned moment. Return what the kill interrupted, or "".

    If the launch resumes after the planned update, the launch is killed in its first update or
    save. The result is "" if the launch had already ended.
    """
    # find the moment
    update = max(kill.update, resumed_at + 1)

    def come() -> bool:
        done = launch.updates() or 0
        if kill.save and resumed_at < updates:
            return done >= update and launch.saving()
        return done >= update - 1

    tail = TRAINING_SHARE * pace.tail
    seconds = pace.save if kill.save else pace.update if update <= updates else tail

    # wait and kill
    if not launch.wait_for(lambda: launch.updates() is not None):
        return ""
    family = launch.family()  # finding these processes takes longer than a save of a small network
    if not launch.wait_for(come):
        return ""
    time.sleep(kill.share * seconds)
    launch.kill(family)

    # what was interrupted
    if launch.process.returncode >= 0:  # the training had already ended
        return ""
    done = launch.updates() or 0
    if launch.saving():
        return f"the save of update {done}"
    return f"update {done + 1}" if done < updates else AFTER_LAST

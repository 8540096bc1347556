"""One scene on one way, and what was seen."""

from __future__ import annotations

from collections.abc import Callable

from qrexec_activate.loopback.machine import Machine

from .report import CANNOT, RIGHT, WRONG, Verdict
from .scenes import Scene
from .stage import Stage, reason
from .ways import Cannot, Seen, Way

__all__ = ["play"]


def play(
    scene: Scene, machine: Machine, make: Callable[[Machine], Way]
) -> Verdict:
    """Play it, and leave nothing of it."""
    stage = Stage(machine, make(machine))
    try:
        scene(stage)
    except Cannot as error:
        return Verdict(CANNOT, str(error))
    except (Seen, OSError) as error:
        return Verdict(WRONG, reason(error, stage.patience))
    finally:
        stage.clean_up()
    return Verdict(RIGHT)

"""What a budget search tells its watcher."""

from contrib.budget.budget import Progress
from orthorank.common.progress import Advance, Screen


class MixedWatcher:
    """Turns the progress of a search into a bar in per cent.

    Args:
        advance, screen: where progress is shown.
    """

    def __init__(self, advance: Advance, screen: Screen) -> None:
        self.advance, self.screen = advance, screen
        self.phase, self.percent = "", 0

    def __call__(self, progress: Progress) -> None:
        if progress.phase != self.phase:
            self.phase = progress.phase
            self.screen.say(f"{progress.phase}; best {progress.best:.4f}")
        self.percent = max(self.percent, int(100 * progress.done / progress.expected))
        count = f"{progress.done} of about {progress.expected}"
        self.advance(self.percent, f"{count}; {progress.phase}; best {progress.best:.4f}")

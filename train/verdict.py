"""What a result amounts to, in one sentence. Pure; used by the report and by the quickstart's last lines."""

from collections.abc import Sequence
from dataclasses import dataclass

from robot.statistics import Interval, wilson
from train.report_blocks import Tone
from vla.types import Result


@dataclass(frozen=True)
class Count:
    """Successes among the episodes that have a verdict."""

    successes: int
    episodes: int

    @classmethod
    def of(cls, episodes: Sequence[Result]) -> "Count":
        judged = [e for e in episodes if e.error is None]
        return cls(sum(e.success for e in judged), len(judged))

    @property
    def rate(self) -> float:
        return self.successes / self.episodes if self.episodes else 0.0

    @property
    def interval(self) -> Interval:
        return wilson(self.successes, self.episodes)

    def __str__(self) -> str:
        return f"{self.successes} of {self.episodes}"

    @property
    def with_interval(self) -> str:
        """e.g. "78 of 80 (97.5 %, 95 % interval 91.3 to 99.3 %)"."""
        if not self.episodes:
            return "no episode with a verdict"
        low, high = self.interval.low, self.interval.high
        return f"{self} ({percent(self.rate)}, 95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


@dataclass(frozen=True)
class Expected:
    """What a run that went well reaches."""

    success_rate: float  # at least, right instruction
    swap_rate: float  # at most, wrong instruction


@dataclass(frozen=True)
class Verdict:
    tone: Tone
    sentence: str


def judge(success: Count, swap: Count | None, expected: Expected | None) -> Verdict:
    """One sentence on an evaluation and, if there was one, its test with the wrong instruction."""
    if not success.episodes:
        return Verdict("bad", "No episode was judged, so there is no success rate.")
    result = f"The policy solved {success.with_interval} of the episodes on unseen seeds"
    if swap is not None and swap.episodes:
        result += f"; given the wrong instruction it solved {swap}"
    if expected is None:
        return Verdict("plain", f"{result}.")
    short = []
    if success.rate < expected.success_rate:
        short.append(f"success is below the expected {percent(expected.success_rate)}")
    if swap is not None and swap.rate > expected.swap_rate:
        short.append(
            f"with the wrong instruction more than {percent(expected.swap_rate)} still succeed, so the policy does not "
            "follow the instruction as it should"
        )
    if short:
        return Verdict("warning", f"{result}. Below expectation: {'; '.join(short)}.")
    means = ", and the instruction decides what it does" if swap is not None and swap.episodes else ""
    return Verdict("good", f"{result}. That is what a good run reaches{means}.")


def percent(rate: float) -> str:
    """0.975 -> "97.5 %", 0.9 -> "90 %"."""
    text = f"{100 * rate:.1f}"
    return f"{text.removesuffix('.0')} %"

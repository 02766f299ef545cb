"""The sentence that a result is summed up in."""

import pytest

from train.verdict import Count, Expected, judge, percent

WANTED = Expected(success_rate=0.9, swap_rate=0.05)


@pytest.mark.parametrize(
    ("success", "swap", "tone", "words"),
    [
        (Count(72, 80), Count(2, 40), "good", "a good run reaches, and the instruction decides"),
        (Count(71, 80), Count(2, 40), "warning", "success is below the expected 90 %"),
        (Count(80, 80), Count(3, 40), "warning", "more than 5 % still succeed"),
        (Count(80, 80), None, "good", "a good run reaches."),
        (Count(0, 0), Count(0, 40), "bad", "no success rate"),
    ],
)
def test_judge_at_the_borders(success: Count, swap: Count | None, tone: str, words: str) -> None:
    verdict = judge(success, swap, WANTED)
    assert verdict.tone == tone
    assert words in verdict.sentence


def test_judge_says_both_shortfalls() -> None:
    sentence = judge(Count(1, 80), Count(40, 40), WANTED).sentence
    assert "below the expected" in sentence
    assert "does not follow the instruction" in sentence


def test_judge_without_expectation_only_states() -> None:
    verdict = judge(Count(0, 2), Count(0, 2), None)
    assert verdict.tone == "plain"
    assert verdict.sentence == (
        "The policy solved 0 of 2 (0 %, 95 % interval 0.0 to 65.8 %) of the episodes on unseen seeds; "
        "given the wrong instruction it solved 0 of 2."
    )


def test_interval_in_words() -> None:
    assert Count(78, 80).with_interval == "78 of 80 (97.5 %, 95 % interval 91.3 to 99.3 %)"


def test_percent() -> None:
    assert [percent(x) for x in (0.0, 0.05, 0.975, 1.0)] == ["0 %", "5 %", "97.5 %", "100 %"]

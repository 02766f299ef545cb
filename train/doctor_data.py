"""The doctor of data sets: what is broken, what looks wrong, and what the recipe misdescribes.

It reads the data set as it lies on disk, so that it can report what training would refuse. A data set in
which it finds no error is one that training accepts.
"""

from train import doctor_meaning, doctor_numbers, doctor_pictures, doctor_rows
from train.dataset import LeRobotSource
from train.findings import Finding
from train.raw_table import read_raw
from train.recipe import Recipe
from vla.errors import DataError, TandemError

CHECKS = (*doctor_rows.CHECKS, *doctor_numbers.CHECKS, *doctor_meaning.CHECKS)


def examine(recipe: Recipe, looked_at: int) -> list[Finding]:
    """All findings, in the order of the checks.

    Args:
        looked_at: episodes whose pictures are decoded; 0 means all.
    """
    try:
        table = read_raw(recipe)
    except DataError as error:
        return [_refused(error)]
    findings = [finding for check in CHECKS for finding in check(table)]
    findings += doctor_pictures.examine(table, looked_at)
    if not any(f.severity == "error" for f in findings):
        try:
            LeRobotSource(recipe, 1, "train")
        except TandemError as error:
            findings.append(_refused(error))
    return findings


def _refused(error: TandemError) -> Finding:
    return Finding(
        "error", "refused", str(error), "Training refuses this data set.", "Do what the message says, then check again."
    )

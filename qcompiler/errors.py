"""Every error that qcompiler raises on purpose.

A message has one form, in one line: what is wrong, where, what to do. The command line prints it and
leaves with exit code 2; anything that is not a `QcompilerError` is a bug of ours.
"""

from __future__ import annotations

from dataclasses import dataclass


class QcompilerError(Exception):
    """What is wrong, where it is wrong, and what the user can do about it.

    Args:
        what: the fault, without a full stop.
        where: file, node, site, option: whatever locates the fault; may be empty.
        fix: what to do instead; may be empty.
    """

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        message = f"{where}: {what}" if where else what
        super().__init__(" ".join((f"{message}; {fix}" if fix else message).split()))


class BadModel(QcompilerError):
    """The model file is missing, broken, hostile, or holds something that nobody can compile."""


class NotFinite(BadModel, ValueError):
    """Numbers that leave float32: of the weights, or of what they make of the data."""


class BadData(QcompilerError):
    """Calibration or evaluation data that the model cannot take."""


class BadOption(QcompilerError):
    """An option, a pipeline file or a name in it that means nothing."""


class BudgetInfeasible(QcompilerError):
    """No plan fits the budget. The message says the smallest feasible budget and what takes the room."""


class MissingExtra(QcompilerError):
    """An optional dependency is needed: the message says what to install."""

    def __init__(self, extra: str, needed_for: str) -> None:
        super().__init__(f"{needed_for} needs an optional dependency", fix=f"pip install 'qcompiler[{extra}]'")


class BackendUnavailable(QcompilerError):
    """The target's toolchain is not usable on this machine."""


class SolverUnavailable(QcompilerError):
    """No integer solver is usable on this machine."""


class OutputError(QcompilerError):
    """The output folder cannot be written: read-only, full disk, exists and is not ours."""


class PassRefused(QcompilerError):
    """A pass declines to run on this model; the reason is part of its contract and is tested."""


class ContractViolated(QcompilerError):
    """A pass did not keep its contract; names the pass and the first value that differs."""


class VerificationFailed(QcompilerError):
    """The artifact does not compute what its QDQ reference computes."""


@dataclass(frozen=True)
class Refusal:
    """Something that was not done, where, and why. Not an error: the rest of the work goes on."""

    where: str
    reason: str

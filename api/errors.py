"""Every error that Trainmaster raises on purpose.

    TrainmasterError
    ├── ConfigError          the experiment, its overrides or its files are wrong: found before anything starts
    │   └── DataError        a dataset's content is wrong (names file and line, or sample)
    ├── ModelError           a model cannot be split, loaded or saved as asked
    ├── ProtocolError        a message that our protocol does not allow
    ├── ProgramError         a pipeline program that would hang, or compute something else than it should
    ├── Interrupted          a signal asked the service to stop
    └── RunError             the run failed
        ├── WorkerLost       a worker died, fell silent or closed its connection
        ├── PeerLost         communication between two workers failed: a symptom, the cause is likely over there
        ├── RemoteError      a request failed on a worker; carries the remote traceback
        ├── RewardError      a reward function gave no score for a sample
        └── DeadlineExceeded a named wait took longer than it was given

Messages name the field, the value, the rule and the cure. `exit_code` is what the command line leaves with.
"""

from __future__ import annotations

import signal
from typing import ClassVar


class TrainmasterError(Exception):
    """The root: catch this to catch all of ours."""

    exit_code: ClassVar[int] = 1


class ConfigError(TrainmasterError):
    """One wrong field. `ConfigError("model.layout.pp", 3, "must be at most the model's 2 layers", "lower it")`."""

    exit_code: ClassVar[int] = 2

    def __init__(self, field: str, value: object, rule: str, cure: str) -> None:
        self.field, self.value, self.rule, self.cure = field, value, rule, cure
        super().__init__(f"{field} = {value!r}: {rule}. {cure[:1].upper()}{cure[1:]}.")


class DataError(ConfigError):
    """A dataset's content is wrong; `value` says where."""


class ModelError(TrainmasterError):
    """A model that we cannot split, load or save as asked; the message says what would work."""

    exit_code: ClassVar[int] = 2


class ProtocolError(TrainmasterError):
    """A frame or message outside of the protocol."""


class ProgramError(TrainmasterError):
    """A pipeline program that would hang, or compute something else than it should. Names the instruction."""


class Interrupted(TrainmasterError):
    """A signal asked the service to stop."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number
        super().__init__(f"stopped by {number.name}")


class RunError(TrainmasterError):
    """The run failed after it started. Its notes say where it was."""

    likely: str = ""
    """What it usually comes from, and what to do then."""


class WorkerLost(RunError):
    """A worker died, fell silent or closed its connection; or was given up for a reason of its own, `likely`'s."""

    likely = (
        "its process was killed (out of memory?), crashed in native code, or its host was cut off. Look at the end of "
        "its output and log, and at the kernel's log on its host"
    )

    def __init__(self, message: str, likely: str = "") -> None:
        super().__init__(message)
        self.likely = likely or self.likely


class PeerLost(RunError):
    """Communication with another worker failed; the cause is likely over there."""

    likely = "another worker of the same group failed first, or their hosts lost each other: look into its log"


class RemoteError(RunError):
    """A request failed on a worker.

    `kind` is the remote exception's class name, `remote_traceback` its formatted traceback.
    """

    likely = "an error in the worker: its traceback is above"

    def __init__(self, where: str, kind: str, message: str, remote_traceback: str) -> None:
        self.where, self.kind, self.message, self.remote_traceback = where, kind, message, remote_traceback
        super().__init__(f"{where} failed with {kind}: {message}")


class RewardError(RunError):
    """A reward function gave no score: the message names the sample, the function, the reason and the cure."""


class DeadlineExceeded(RunError):
    """A wait with a name took longer than it was given."""

    likely = "a hang (the stacks tell where), or mere slowness: then give it more time (run.deadlines), or less work"


def first_cause(error: BaseException) -> BaseException:
    """The first error in a (nested) group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

"""The one error tree. Everything a person can mend is a `SnugtuneError`; anything else is a bug of ours.

The command line prints a `SnugtuneError` as one line and exits with its `exit_code`; other exceptions keep their
traceback and exit with 1.
"""


class SnugtuneError(Exception):
    """Something the user can mend. The message names the file, line or field, and the fix."""

    exit_code = 2


class InputError(SnugtuneError):
    """A config, data file, model, adapter or output folder that cannot be used as it is."""


class DoesNotFitError(SnugtuneError):
    """No plan stays within the memory budget; the message says by how much, and what would."""

    exit_code = 3


class StorageError(SnugtuneError):
    """The disk refused a write (full, read-only, no permission). Nothing half-written is left behind."""


class GradientError(SnugtuneError):
    """The self-test at start-up found a gradient that is not that of the weights. Nothing was trained."""


class UnreadableError(StorageError):
    """The disk no longer gives or takes what a step keeps there. The step in which it happened did not happen."""


class OutOfMemoryError(SnugtuneError):
    """Memory ran out, and nothing is left that could be done with less of it. The step in which it did so did not happen."""

    exit_code = 3


class JobFailedError(SnugtuneError):
    """Jobs of a run were given up; what its other jobs trained is there."""


class DivergedError(JobFailedError):
    """A job's gradient stayed non-finite, and it was given up; what other jobs of the run trained is there."""


class StopRequestedError(Exception):
    """The user asked to stop in the middle of a step; that step did not happen."""


class Interrupted(SnugtuneError):
    """Ctrl-C or SIGTERM. What was trained is saved; the same command goes on from there."""

    exit_code = 130

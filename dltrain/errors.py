"""What a user can be told: each kind of failure and the exit code that a script sees."""


class DltrainError(Exception):
    """A failure that is not a bug of ours: shown as one line, without a traceback.

    The message says what, where, and how to mend it.
    """

    exit_code = 2


class ConfigError(DltrainError):
    """Wrong usage or a wrong config."""

    exit_code = 2


class DataError(DltrainError):
    """Data that is missing, broken, or not what it claims to be."""

    exit_code = 3


class CheckpointError(DltrainError):
    """A checkpoint that is broken, of another format, or does not fit."""

    exit_code = 4


class OtherFormatError(CheckpointError):
    """A checkpoint that is whole, and of a format that this version does not read."""


class DeviceError(DltrainError):
    """A device that is absent, unusable or out of memory."""

    exit_code = 5


class PeerLostError(DeviceError):
    """Another process of the run has gone."""


class OutputError(DltrainError):
    """An output that cannot be written: a full disk, a path that is not writable."""

    exit_code = 6


class DivergedError(DltrainError):
    """A loss or gradient that is not finite."""

    exit_code = 7


class RunTakenError(DltrainError):
    """A run folder that another process holds, or that holds a run already."""

    exit_code = 8


def names_peer(error: Exception) -> bool:
    """Whether an error says that another process of the run does not answer; torch's class says it of nccl alone."""
    classes = {each.__name__ for each in type(error).__mro__}
    return "DistError" in classes or "gloo" in str(error) or "Connection closed by peer" in str(error)


def names_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: Python's, or one of torch's, which has a class for CUDA's alone."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


class Stopped(DltrainError):
    """Training stopped by a signal, after saving."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum

"""The exception of what cannot run here."""


class KernelUnavailable(RuntimeError):  # noqa: N818 - says what is wrong, as FileNotFoundError does
    """A kernel cannot be built or run on this machine; the message is one sentence, with the cure."""

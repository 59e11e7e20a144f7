"""The one exception for what a user can mend, and sentences that several places say."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one sentence that says what is wrong and how to mend it; the command line prints it and exits with 2.
    """


def not_installed(package: str) -> str:
    """What to say where a package of ONNX is missing, which is an extra."""
    return (
        f"{package} is not installed; run `pip install 'bakeout[cpu]'`, or with an NVIDIA GPU "
        "`pip install 'bakeout[gpu]'`"
    )

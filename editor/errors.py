"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one sentence that says what is wrong and how to mend it; the command line prints it and exits with 2.
    """

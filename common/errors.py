"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """Bad input: one sentence that says what is wrong and what to do. The command line prints it and exits with 2."""

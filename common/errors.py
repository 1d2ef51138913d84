"""How a command ends early: by the user's mistake, or by the user's wish."""


class UserError(Exception):
    """Bad input: one sentence that says what is wrong and what to do. The command line prints it and exits with 2."""


class Interrupted(Exception):
    """Training was told to stop and has saved its state; `code` is the exit status a shell expects (130 after Ctrl-C)."""

    def __init__(self, message: str, code: int):
        super().__init__(message, code)
        self.message, self.code = message, code

    def __str__(self) -> str:
        return self.message

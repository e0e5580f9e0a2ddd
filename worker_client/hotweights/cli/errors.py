"""What a command itself finds wrong."""


class CommandFailed(Exception):
    """The command ends with this one line on stderr. Exit code 2 is for what the user wrote, 1 for the rest."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code

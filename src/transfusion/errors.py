"""The one error a user can mend, and the exit codes. The command line prints the error as one line and exits with 2."""

EXIT_BAD_INPUT = 2
EXIT_STOPPED_EARLY = 75
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Says what is wrong, where, and the remedy."""

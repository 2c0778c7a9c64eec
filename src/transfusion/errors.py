"""The one error a user can mend. The command line prints it as one line and exits with code 2."""


class UserError(Exception):
    """Says what is wrong, where, and the remedy."""

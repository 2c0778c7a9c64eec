"""The one error a user can mend, and the exit codes. The command line prints the error as one line and exits with 2."""

EXIT_BAD_INPUT = 2
# Letters of a name in a message.
_SHOWN = 500
EXIT_STOPPED_EARLY = 75
EXIT_INTERRUPTED = 130


def shown(text: object) -> str:
    """A name from outside as a message may hold it: in one line, whatever letters it has, and not too long."""
    plain = str(text)
    plain = plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN]}..."
    return plain if plain.isprintable() else ascii(plain)


class UserError(Exception):
    """Says what is wrong, where, and the remedy."""

"""The one error a user can mend, and the exit codes. The command line prints the error as one line and exits with 2."""

import errno

EXIT_BAD_INPUT = 2
_REMEDIES = {
    errno.EMFILE: "raise the limit of open files, as with `ulimit -n 65536`",
    errno.ENFILE: "raise the system's limit of open files",
    errno.ENOSPC: "free some space, or name a folder on another disk",
    errno.EDQUOT: "free some space within the quota, or name a folder on another disk",
    errno.EROFS: "name a folder that can be written",
    errno.ENAMETOOLONG: "use a shorter name",
}
# Letters of a name in a message.
_SHOWN = 500
EXIT_STOPPED_EARLY = 75
EXIT_INTERRUPTED = 130


def describe(error: OSError, *, advise: bool = True) -> str:
    """What the system says is wrong, with which file, and with `advise` what helps where that is known."""
    where = f" ({shown(error.filename)})" if error.filename else ""
    remedy = f"; {_REMEDIES[error.errno]}" if advise and error.errno in _REMEDIES else ""
    return f"{error.strerror or error}{where}{remedy}"


def shown(text: object) -> str:
    """A name from outside as a message may hold it: in one line, whatever letters it has, and not too long."""
    plain = str(text)
    plain = plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN]}..."
    return plain if plain.isprintable() else ascii(plain)


class UserError(Exception):
    """Says what is wrong, where, and the remedy."""

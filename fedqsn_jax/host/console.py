"""The console through which a command speaks to its user."""

import os

from rich.console import Console


class EnduringConsole(Console):
    """A console that falls silent when nobody reads it any more, as after ``| head``.

    By itself Rich ends the process then; a training run should not cost more than its output.
    """

    def on_broken_pipe(self) -> None:
        """Lets all that is written to the same file, by whomever, go nowhere from here on."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


def standard_console() -> Console:
    """Returns a console on standard output; in a notebook one that is like a pipe.

    There Rich would make an HTML output of its own of every line, and has no live display. That a
    notebook's kernel asks for colours (``FORCE_COLOR``) does not make it a terminal.
    """
    console = EnduringConsole()
    if console.is_jupyter:
        return EnduringConsole(force_jupyter=False, force_terminal=False)
    return console

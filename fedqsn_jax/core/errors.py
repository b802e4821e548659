"""Mistakes of users, which the commands answer with one line."""


class UserError(ValueError):
    """A mistake of the user's; the message is one line: what, where, and what is allowed."""

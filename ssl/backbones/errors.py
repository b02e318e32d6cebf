"""The one exception for mistakes of the user's."""


class UserError(ValueError):
    """A mistake of the user's, told in one paragraph that names the thing and the mend.

    The command line prints the paragraph and exits with code 2; a traceback never shows.
    """

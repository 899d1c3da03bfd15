"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class KavaError(Exception):
    """Bad input: one line that names the field, its value and the remedy.

    The command line prints the message to stderr and exits with code 2, without a traceback.
    Library callers may catch it; nothing has been written or changed when it is raised.
    """

# SPDX-License-Identifier: Apache-2.0
"""The exceptions of `lorax_transfer`: each message is one sentence that a user can act on."""


class TransferError(Exception):
    """Base of everything `lorax_transfer` raises on bad input.

    The command line prints the message and exits with status 1; a caller that wants to handle any
    failure of the package catches this one class.

    Example:
        >>> try:
        ...     raise CheckpointError("No checkpoint at 'base': the path does not exist.")
        ... except TransferError as error:
        ...     print(error)
        No checkpoint at 'base': the path does not exist.
    """


class CheckpointError(TransferError):
    """A base model cannot be found or read."""


class AdapterError(TransferError):
    """An adapter cannot be found, read or carried over."""


class MatchError(TransferError):
    """Adapter, source and target do not belong together."""


class OutputError(TransferError):
    """The result cannot be written where it was asked for."""

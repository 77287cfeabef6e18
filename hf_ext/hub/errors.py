"""What can go wrong on the way to the Hub. Every message is complete without a traceback."""


class HubError(Exception):
    """A repository cannot be written or uploaded; the message says why and what to do."""


class ExportError(HubError):
    """A plugin cannot be written as a Hub repository."""

"""Errors of the model.

SupirModelError
├── WeightsError   a weights file is missing, damaged, or does not fit the network
└── RequestError   an image or a setting the model cannot work with
"""


class SupirModelError(Exception):
    """Base of every error this package raises on purpose; the message says what, where, what was seen, what to do."""


class WeightsError(SupirModelError):
    """A weights file is missing, damaged, or does not fit the network. Retrying does not help."""


class RequestError(SupirModelError):
    """An image or a setting the model cannot work with. Retrying does not help."""

"""The errors of the lake. This module loads no library of the lake."""

from models.errors import EvalstoreError, Outage


class LakeOutage(Outage):
    """The warehouse or the catalog is unreachable or refuses work. Retry."""


class LakeMismatch(EvalstoreError):
    """The warehouse belongs to another evalstore or to a newer release. Correct EVALSTORE_LAKE_URL or deploy that release."""


class LakeDamaged(EvalstoreError):
    """A file of the lake is missing or cannot be read. The message names the file."""

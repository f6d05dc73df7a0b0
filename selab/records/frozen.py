"""The base class of what is stored."""

import msgspec


class Frozen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class for immutable, keyword-only, strictly validated values."""

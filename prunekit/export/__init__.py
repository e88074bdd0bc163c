"""From the pruned network to a directory that loads, and the proof that it does."""

from prunekit.errors import NotVerified
from prunekit.export.hf import save, to_transformers
from prunekit.export.verify import Verified, verify

__all__ = ["NotVerified", "Verified", "save", "to_transformers", "verify"]

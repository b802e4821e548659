"""Where the tests find the repository's own files."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "fedqsn_jax"
GOLDENS = TESTS / "goldens"
LANGUAGE_GOLDENS = GOLDENS / "language"
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Real data sets, where they are laid beside the checkout; tests that read them are marked."""

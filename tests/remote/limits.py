"""How long the tests try."""

from actcache.store.remote import Patience

QUICK = Patience(attempts=4, attempt_s=4.0, first_wait_s=0.01, most_wait_s=0.05, total_s=16.0)
"""Waits of hundredths of seconds, and a deadline far above what a request takes on a busy machine."""

SHORT = Patience(attempts=2, attempt_s=0.3, first_wait_s=0.01, most_wait_s=0.02, total_s=5.0)
"""For servers that never answer as they should: every attempt takes its whole deadline."""

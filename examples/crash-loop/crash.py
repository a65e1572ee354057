"""Ends at once, and says why."""

import sys

print("reading the settings", flush=True)
print("fatal: DATABASE_URL is not set", file=sys.stderr, flush=True)
sys.exit(1)

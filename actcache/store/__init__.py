"""Format 1: the bytes on disk, and the only code that writes or checks them. Imports no torch."""

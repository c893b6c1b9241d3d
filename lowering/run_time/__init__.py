"""Plans and orders that depend on run-time values, computed on traced arrays."""

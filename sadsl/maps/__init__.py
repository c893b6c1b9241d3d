"""Index maps: which keys a query sees."""

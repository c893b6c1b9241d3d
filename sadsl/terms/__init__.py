"""Terms: how pairs are scored and normalised, and how terms combine. Values only."""

"""Which keys a shard of queries needs from others, and how they travel."""

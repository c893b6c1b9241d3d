"""What can be said of a spec without running it: plans, costs, properties, caches."""

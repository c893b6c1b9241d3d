"""Analyses of specs that do not run them: lowering, costs, properties and caches."""

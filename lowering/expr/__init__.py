"""Passes over one expression: print, simplify, evaluate, test inside a kernel."""

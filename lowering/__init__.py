"""Node in, kernel call out; imported by sadsl. No stability promise."""

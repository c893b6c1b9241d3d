"""One expression: printed, simplified, evaluated, tested in a kernel."""

"""The command line ``sadsl``: specs explained, drawn, compiled and timed in a shell."""

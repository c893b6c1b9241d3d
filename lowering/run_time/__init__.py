"""The decisions of the pipeline on traced arrays."""

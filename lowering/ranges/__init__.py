"""What an expression can be on a rectangle of positions: all, some or none true."""

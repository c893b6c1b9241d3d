"""Other orders of the positions, and the decision whether one is worth its cost."""

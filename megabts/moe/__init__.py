"""Mixtures of experts made from members: Branch-Train-MiX and sparse upcycling."""

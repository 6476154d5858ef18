"""Mixtures of experts made from members: Branch-Train-MiX, BAM, BAM adapters and sparse upcycling."""

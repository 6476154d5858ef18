"""Whole experiments as stages: corpora, seed, experts, stitch, evaluation, report."""

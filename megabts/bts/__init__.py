"""Branch-Train-Stitch (arXiv 2502.00075)."""

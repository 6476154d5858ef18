"""Ways to combine members that are not stitches."""

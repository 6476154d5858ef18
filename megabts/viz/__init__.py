"""Figures and reports for people: the top layer, the only one that imports matplotlib and jinja2."""

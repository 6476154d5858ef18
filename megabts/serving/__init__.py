"""Answering over HTTP: a model of any method behind an OpenAI-compatible interface, many requests at a time."""

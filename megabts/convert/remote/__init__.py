"""Python files that go into an exported folder as they are: they import torch and transformers alone."""

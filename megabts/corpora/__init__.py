"""Built-in training texts for the quickstart: made from the installation alone, no network."""

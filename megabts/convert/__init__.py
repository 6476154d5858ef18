"""Hugging Face folders from checkpoints, and checkpoints from them, each checked after it is written."""

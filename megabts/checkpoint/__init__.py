"""Checkpoints: durable, verified storage of tensors, and Hugging Face folders read by name."""

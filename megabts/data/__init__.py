"""From text to token batches: preprocessing, the indexed dataset format, samples, blends, loading."""

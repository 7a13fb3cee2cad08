"""What is left of a model: perplexity, of a checkpoint streamed block by block or of a loaded model."""

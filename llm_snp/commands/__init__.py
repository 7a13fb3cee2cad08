"""What `python -m llm_snp` can do: one module per command, found by its name."""

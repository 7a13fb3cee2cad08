"""A result as one GGUF file, for llama.cpp and what stands on it."""

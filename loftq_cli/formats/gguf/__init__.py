"""GGUF files for llama.cpp: layout, metadata and vocabulary."""

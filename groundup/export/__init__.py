"""How does it leave? As a GGUF for llama.cpp, a folder for Ollama or a clean Hugging Face folder. Open run.py first."""

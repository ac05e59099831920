"""Downloads of hf:// and openai:// addresses."""

"""Model cards: `README.md` of a model's folder in Hugging Face's format, made from its record and its other files."""

"""Tokenizers behind one small protocol: SentencePiece, Hugging Face `tokenizers`, bytes, integers."""

"""Examples to token ids and loss masks."""

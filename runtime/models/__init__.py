"""The decoder, its layers, and its weights in and out."""

"""What stages read: data, tokenizers, models and their weights, opened when first asked for."""

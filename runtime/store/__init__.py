"""What stages yielded, by fingerprint, in files that survive crashes."""

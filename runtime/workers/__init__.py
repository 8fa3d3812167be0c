"""Calls into functions that may raise, hang or crash, in processes of their own."""

"""Turns examples into token ids and loss masks, and these into batches.

- `tokenizers`: tokenizers of bytes, SentencePiece and Hugging Face behind one interface.
- `open_tokenizer`: opens a declared tokenizer, or trains it on data.
- `hf_files`: writes a tokenizer as `transformers` reads it.
- `chat_templates`: named chat templates, and the rendering of Jinja templates.
- `chat_renderer`: the ids and the mask of an example, or of a prompt.
- `token_cache`: the tokens of a stream, cached on disk.
- `packing`: batches of packed sequences with random access.
"""

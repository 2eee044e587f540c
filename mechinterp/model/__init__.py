"""All that knows Hugging Face: loading, the table of families, hooks, the attention function."""

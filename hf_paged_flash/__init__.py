"""FlashAttention and a paged KV cache for Hugging Face transformers."""

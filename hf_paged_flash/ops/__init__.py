"""Public attention functions with flash-attn's signatures, their registration in torch, and the torch reference."""

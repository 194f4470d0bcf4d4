"""The transformer, its attention and losses, the two heads, and what is applied to a model from outside: LoRA, LISA."""

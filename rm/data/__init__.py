"""Files to examples, and examples to micro-batches: records, texts, tokens, what is held out, packing."""

"""Loading a Hugging Face decoder and wiring it into the attention interface."""

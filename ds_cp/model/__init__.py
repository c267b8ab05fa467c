"""Loading a Hugging Face decoder, wiring it into the attention interface, sampling."""

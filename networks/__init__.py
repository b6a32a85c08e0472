"""Published networks that more than one module is made of: text towers, BERT, the VAE."""
